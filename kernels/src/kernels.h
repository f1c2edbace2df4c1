// The seam between XLA's calls and the kernels: plain arguments, and one table of functions for each instruction set.
//
// Handlers check shapes and dtypes and pass what is here. Kernels check ids, bags and offsets, which are data.
#pragma once

#include <cstdint>

namespace embax {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// Calls body(context, k) for k in [0, tasks) on any threads, and returns when all calls have.
using Body = void (*)(void* context, int64_t k);

struct Pool {
  void (*run)(void* handle, int64_t tasks, void* context, Body body);
  void* handle;
  int threads;
};

// Ids of rows, flat. An id outside of [0, rows) has no row.
struct Ids {
  const void* data;
  int64_t number;
  bool wide;  // int64; else int32
  int64_t from_end = 0;  // the number of rows if ids in [-rows, 0) count from the end; else 0

  int64_t operator[](int64_t i) const {
    const int64_t id = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    return row_of(id, from_end);
  }
  static int64_t row_of(int64_t id, int64_t from_end) { return id < 0 ? id + from_end : id; }
};

// Rows of one width behind one another.
struct Table {
  void* data;
  int64_t rows;
  int64_t width;
  Dtype dtype;
};

// A factor for each id, or none where there is no data.
struct Factors {
  const void* data;
  bool wide;  // float64; else float32
};

// Gradients, and which of them belongs to an id: `length` says that id i has gradient i / length, or is 0, where
// `bag_of[i]` is its number. An id with a number outside of [0, gradients) counts as one without a row.
struct Gradients {
  const void* data;
  int64_t number;
  int64_t width;
  Dtype dtype;
  int64_t length;
  const int32_t* bag_of;
  Factors factors;
};

// Bags of ids: `offsets` (bags + 1) in rising order, or none where all bags have one length.
struct Bags {
  int64_t number;
  const int32_t* offsets;
  Factors factors;
};

// Arrays that each hold some of the results: array k has `sizes[k]` of them, from number `firsts[k]` on.
struct Parts {
  int64_t number;
  void* const* data;
  const int64_t* firsts;
  const int64_t* sizes;
};

enum class Optimizer : int { sgd, adagrad, rowwise_adagrad, adam, rowwise_adam };

// Weight decay: none, added to the gradient before all else, or to the update before the learning rate.
enum class Decay : int { none, gradient, update };

// The numbers of an optimizer's step. What it does not use is 0.
struct Step {
  Optimizer optimizer;
  Decay decay;
  bool nesterov;
  double rate, decay_by, eps, eps_root;
  double b1, rest1, b2, rest2;  // decays of the moments, and 1 minus them
  double mean_by, square_by, gradient_by;  // corrections of the bias
};

// The state of an optimizer. The mean may have another dtype than the table; `squares` has one number a row, in
// accumulators, where the optimizer is row-wise, else as many as the table, in its dtype.
struct State {
  void* mean;
  Dtype mean_dtype;
  void* squares;
};

// Tables of word vectors, and the text to learn from. Python fills this structure, see `_kernels/words.py`. Kernels
// get it checked: ids are in [-1, rows), where -1 ends a sequence; aliases in [0, rows); pieces in [0, input_rows), and
// every word that occurs has one.
struct Training {
  float *inputs, *outputs;  // rows of `stride` numbers, a multiple of 16; those behind a vector are 0
  const int32_t* ids;
  const uint32_t* keep;  // for each word: it is kept if 32 random bits are at most this
  const uint32_t* cut;   // noise by Walker's aliases: a row, or its alias if 32 random bits are more than this
  const int32_t* alias;
  const int32_t *starts, *pieces;  // word k has the inputs pieces[starts[k]:starts[k + 1]]; or none: row k alone
  int64_t stride, input_rows, rows;  // rows of outputs, one for each word
  int64_t number, number_of_pieces;  // of ids and of pieces
  int64_t window, negative, parts;
  uint64_t seed;
  float first_rate, last_rate;
  bool cbow;
};

struct TrainingLoss {
  double sum;
  int64_t pairs;
};

struct Kernels {
  const char* name;

  // The row of each id, or `fill`, one row of as many bytes.
  void (*take)(const Pool&, const void* table, int64_t rows, int64_t row_bytes, Ids, const void* fill, const Parts&);

  // table[ids[i]] = values[i]; of duplicates, the last one.
  void (*set)(const Pool&, void* table, int64_t rows, int64_t row_bytes, Ids, const void* values);

  // table[ids[i]] += values[i].
  void (*add)(const Pool&, Table, Ids, const void* values);

  // The sums of the gradients of each distinct id, and how many there are. Behind them, ids are `rows`, sums zero.
  int64_t (*combine)(const Pool&, int64_t rows, Ids, const Gradients&, void* out_ids, void* out_sums);

  // The sum of the rows of each bag times their factors. The smallest id counts not at all, unless ids count from the
  // end; `fill` is one row.
  void (*pool)(const Pool&, Table, Ids, const Bags&, const void* fill, const Parts&);

  // One step of an optimizer on the rows with an id, in place.
  void (*step)(const Pool&, const Step&, Table, State, Ids, const Gradients&);

  // Learns word vectors from a text, in place. The loss is that of some of the pairs.
  TrainingLoss (*train_words)(const Pool&, const Training&);
};

extern const Kernels kernels_base;
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;

// The kernels for this machine, or for the instruction set that EMBAX_KERNELS_ISA names.
const Kernels& kernels();

}  // namespace embax
