// Calls the library's functions with random shapes, dtypes, ids, alignments and threads, under sanitizers.
//
// A case in four does not fit: it must be refused, or be as good as another. Results are compared with plain loops where
// that is short; their bits are the business of the tests in Python. `LLVMFuzzerTestOneInput` takes the bytes of
// libFuzzer; without it, main draws them: fuzz [seconds] [seed].
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "exports.h"
#include "xla.h"

namespace {

using namespace stand_in;

constexpr XLA_FFI_DataType kFloats[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_F64, XLA_FFI_DataType_BF16,
                                        XLA_FFI_DataType_F16};

// Bytes as choices; zeros behind the last one.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint64_t word() {
    state_ ^= (at_ < size_ ? data_[at_++] : 0) + 0x9E3779B97F4A7C15ull + (state_ << 6);
    state_ *= 0xD1342543DE82EF95ull;
    return state_ ^ state_ >> 29;
  }
  int64_t below(int64_t n) { return n <= 0 ? 0 : static_cast<int64_t>((word() >> 8) % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
  uint64_t state_ = 1;
};

class Case {
 public:
  explicit Case(Choices& c)
      : c(c), dtype(kFloats[c.below(4)]), accumulator(dtype == XLA_FFI_DataType_F64 ? dtype : XLA_FFI_DataType_F32),
        id_dtype(c.one_in(2) ? XLA_FFI_DataType_S32 : XLA_FFI_DataType_S64),
        rows(c.one_in(8) ? 0 : c.below(200)), number(c.one_in(3) ? c.below(9000) : c.below(60)),
        offset(c.one_in(2) ? 0 : 8 * c.below(8)), ids(id_dtype, {number}, offset) {
    const int64_t width = c.one_in(4) ? c.below(300) : c.below(20);
    if (!c.one_in(6)) row.push_back(width);
    if (c.one_in(6)) row.push_back(1 + c.below(2));
    fill_ids(ids, rows, c.one_in(4));
  }

  std::vector<int64_t> shape(int64_t length) const {
    std::vector<int64_t> shape{length};
    shape.insert(shape.end(), row.begin(), row.end());
    return shape;
  }

  Array numbers(XLA_FFI_DataType of, std::vector<int64_t> with) {
    Array array(of, with, offset);
    for (int64_t k = 0; k < array.size(); ++k) {
      const double x = static_cast<double>(c.below(2001) - 1000) / 256;
      if (of == XLA_FFI_DataType_F64) array.as<double>()[k] = x;
      if (of == XLA_FFI_DataType_F32) array.as<float>()[k] = static_cast<float>(x);
      if (bytes_of(of) == 2) array.as<uint16_t>()[k] = static_cast<uint16_t>(c.word());  // NaN and infinity, too
    }
    return array;
  }

  // `rising`: most ids are in the order of the rows, as those of many tables.
  void fill_ids(Array& array, int64_t most, bool rising = false) {
    for (int64_t k = 0; k < array.size(); ++k) {
      const bool in_order = rising && most && !c.one_in(20);
      const int64_t id = in_order ? k * most / array.size() : any_id(most, array.dtype());
      if (array.dtype() == XLA_FFI_DataType_S64) {
        array.as<int64_t>()[k] = id;
      } else {
        array.as<int32_t>()[k] = static_cast<int32_t>(id);
      }
    }
  }

  int64_t id(int64_t i) { return id_dtype == XLA_FFI_DataType_S64 ? ids.as<int64_t>()[i] : ids.as<int32_t>()[i]; }
  bool has_row(int64_t i) { return id(i) >= 0 && id(i) < rows; }
  // The row that an id stands for, if negative ids count from the end, or if not; it may be outside of the table.
  int64_t row_of(int64_t i, bool from_end) { return from_end && id(i) < 0 ? id(i) + rows : id(i); }

  // Calls a handler, and returns whether it took the arguments; a case that fits must be taken.
  bool run(XLA_FFI_Handler* handler, std::vector<Array*> in, std::vector<Array*> out,
           std::map<std::string, Attribute> attributes, bool may_refuse = false) {
    Array other = numbers(kFloats[c.below(4)], shape(c.below(70)));
    const bool spoilt = c.one_in(4);
    if (spoilt && c.one_in(3)) attributes.begin()->second.value = c.below(12) - 4;
    else if (spoilt && c.one_in(2)) out[c.below(static_cast<int64_t>(out.size()))] = &other;
    else if (spoilt) in[c.below(static_cast<int64_t>(in.size()))] = &other;
    embax_kernels_set_threads(static_cast<int>(c.below(4)));
    const std::string error = call(handler, in, out, attributes, 1 + c.below(3), static_cast<When>(c.below(3)));
    if (!error.empty() && !spoilt && !may_refuse) wrong(error.c_str());
    return error.empty() && !spoilt;
  }

  [[noreturn]] void wrong(const char* what) {
    std::fprintf(stderr, "%s: dtype %d, rows %lld, ids %lld\n", what, dtype, static_cast<long long>(rows),
                 static_cast<long long>(number));
    std::abort();
  }

  Choices& c;
  XLA_FFI_DataType dtype, accumulator, id_dtype;
  int64_t rows, number, offset;
  std::vector<int64_t> row;
  Array ids;

 private:
  int64_t any_id(int64_t most, XLA_FFI_DataType of) {
    const bool wide = of == XLA_FFI_DataType_S64;
    switch (c.below(12)) {
      case 0: return wide ? INT64_MIN : INT32_MIN;
      case 1: return wide ? INT64_MAX : INT32_MAX;
      case 2: return -1;
      case 3: return most;
      case 4: return (wide ? INT64_MIN : INT32_MIN) + 1 + c.below(1000);
      case 5:
      case 6: return c.below(3);
      default: return c.below(most + 2);
    }
  }
};

Attribute narrow(int64_t value) { return {XLA_FFI_DataType_S32, value}; }
Attribute wide(int64_t value) { return {XLA_FFI_DataType_S64, value}; }

void take(Case& c) {
  // The rows in one array or in two.
  const int64_t first = c.c.one_in(2) ? c.number : c.c.below(c.number + 1);
  Array table = c.numbers(c.dtype, c.shape(c.rows)), out(c.dtype, c.shape(first), c.offset);
  Array other(c.dtype, c.shape(c.number - first), c.offset);
  std::vector<Array*> outs{&out};
  if (first < c.number || c.c.one_in(2)) outs.push_back(&other);
  const int64_t wrap = c.c.below(2);
  if (!c.run(EmbaxTake, {&table, &c.ids}, outs, {{"nan", narrow(0)}, {"wrap", narrow(wrap)}}) || !c.number) return;
  const int64_t bytes = (out.bytes() + other.bytes()) / c.number;
  const std::string missing(bytes, '\0');
  for (int64_t i = 0; i < c.number; ++i) {
    const int64_t row = c.row_of(i, wrap);
    const char* want = row >= 0 && row < c.rows ? table.data() + row * bytes : missing.data();
    const char* found = i < first ? out.data() + i * bytes : other.data() + (i - first) * bytes;
    if (std::memcmp(found, want, bytes)) c.wrong("take");
  }
}

void put(Case& c) {
  Array table = c.numbers(c.dtype, c.shape(c.rows)), values = c.numbers(c.dtype, c.shape(c.number));
  const std::string before = table.copy();
  const int64_t add = c.c.below(2), bytes = c.number ? values.bytes() / c.number : 0;
  if (!c.run(EmbaxPut, {&table, &c.ids, &values}, {&table}, {{"add", narrow(add)}}) || add) return;
  std::string want = before;
  for (int64_t i = 0; i < c.number; ++i) {
    if (c.has_row(i)) want.replace(c.id(i) * bytes, bytes, values.data() + i * bytes, bytes);
  }
  if (table.copy() != want) c.wrong("put");
}

// Gradients of ids, of bags of two or of bags by number, with factors or without.
struct SomeGradients {
  explicit SomeGradients(Case& c)
      : length(c.number % 2 ? c.c.below(2) : c.c.below(3)),
        values(c.numbers(c.dtype, c.shape(length ? c.number / length : c.c.below(50)))),
        bag_of(XLA_FFI_DataType_S32, {length ? 0 : c.number}, c.offset),
        factors(c.numbers(c.c.one_in(2) ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_F64,
                          {c.c.one_in(2) ? 0 : c.number})) {
    c.fill_ids(bag_of, values.shape()[0]);
  }
  int64_t length;
  Array values, bag_of, factors;
};

void combine(Case& c) {
  SomeGradients g(c);
  Array distinct(c.id_dtype, {c.number}, c.offset), sums(c.dtype, c.shape(c.number), c.offset);
  Array number(XLA_FFI_DataType_S32, {});
  if (!c.run(EmbaxCombine, {&c.ids, &g.values, &g.bag_of, &g.factors}, {&distinct, &sums, &number},
             {{"length", wide(g.length)}, {"rows", wide(c.rows)}}))
    return;
  const int64_t count = *number.as<int32_t>();
  if (count < 0 || count > c.number) c.wrong("combine");
  std::vector<bool> seen(c.rows);
  for (int64_t k = 0; k < c.number; ++k) {
    const int64_t id = c.id_dtype == XLA_FFI_DataType_S64 ? distinct.as<int64_t>()[k] : distinct.as<int32_t>()[k];
    if (k >= count ? id != c.rows : id < 0 || id >= c.rows || seen[id]) c.wrong("combine");
    if (k < count) seen[id] = true;
  }
}

void pool(Case& c) {
  const bool ragged = c.c.one_in(2);
  const int64_t bags = ragged ? c.c.below(80) : c.c.one_in(2) ? c.number : c.number ? 1 : 0;
  Array table = c.numbers(c.dtype, c.shape(c.rows));
  Array offsets(XLA_FFI_DataType_S32, {ragged ? bags + 1 : 0}, c.offset);
  Array factors = c.numbers(c.accumulator, {c.c.one_in(2) ? 0 : c.number});
  int64_t at = 0;
  for (int64_t b = 0; b < offsets.size(); ++b) {  // mostly in order
    offsets.as<int32_t>()[b] = static_cast<int32_t>(at);
    at += c.c.below(2 * c.number / (bags + 1) + 2);
  }
  if (c.c.one_in(4)) c.fill_ids(offsets, c.number);
  // One part of all bags, or two with a gap between them.
  const int64_t first = c.c.one_in(2) ? 0 : c.c.below(bags + 1), second = first + c.c.below(bags - first + 1);
  const int64_t parts = c.c.one_in(2) ? 1 : 2;
  Array firsts(XLA_FFI_DataType_S32, {parts});
  firsts.as<int32_t>()[0] = parts == 1 ? 0 : static_cast<int32_t>(first ? c.c.below(first) : 0);
  if (parts == 2) firsts.as<int32_t>()[1] = static_cast<int32_t>(second);
  Array out(c.accumulator, c.shape(parts == 1 ? bags : first - firsts.as<int32_t>()[0]), c.offset);
  Array other(c.accumulator, c.shape(bags - second), c.offset);
  std::vector<Array*> outs{&out};
  if (parts == 2) outs.push_back(&other);
  c.run(EmbaxPool, {&table, &c.ids, &offsets, &factors, &firsts}, outs,
        {{"nan", narrow(c.c.below(2))}, {"number", wide(bags)}, {"wrap", narrow(c.c.below(2))}});
}

void step(Case& c) {
  SomeGradients g(c);
  const int64_t optimizer = c.c.below(5);
  const bool nesterov = c.c.one_in(2), by_row = optimizer == 2 || optimizer == 4;
  const int64_t sizes[] = {2, 3, 3, nesterov ? 11 : 10, 9};
  XLA_FFI_Handler* const handlers[] = {EmbaxStepSgd, EmbaxStepAdagrad, EmbaxStepRowwiseAdagrad, EmbaxStepAdam,
                                       EmbaxStepRowwiseAdam};
  Array table = c.numbers(c.dtype, c.shape(c.rows));
  Array mean = c.numbers(c.c.one_in(2) ? c.dtype : kFloats[c.c.below(4)], c.shape(c.rows));
  Array squares = by_row ? c.numbers(c.accumulator, {c.rows}) : c.numbers(c.dtype, c.shape(c.rows));
  Array scalars = c.numbers(c.accumulator, {sizes[optimizer]});
  const std::string before = table.copy();
  std::vector<Array*> out{&table};
  if (optimizer >= 3) out.push_back(&mean);
  if (optimizer >= 1) out.push_back(&squares);
  std::vector<Array*> in = out;
  in.insert(in.end(), {&c.ids, &g.values, &g.bag_of, &g.factors, &scalars});
  const int64_t wrap = c.c.below(2);
  std::map<std::string, Attribute> attributes{
      {"decay", narrow(c.c.below(3))}, {"length", wide(g.length)}, {"wrap", narrow(wrap)}};
  if (optimizer == 3) attributes["nesterov"] = narrow(nesterov);
  if (!c.run(handlers[optimizer], in, out, attributes) || !c.rows) return;
  std::vector<bool> touched(c.rows);
  for (int64_t i = 0; i < c.number; ++i) {
    const int64_t row = c.row_of(i, wrap);
    if (row >= 0 && row < c.rows) touched[row] = true;
  }
  const int64_t bytes = table.bytes() / c.rows;
  for (int64_t r = 0; r < c.rows; ++r) {
    if (!touched[r] && std::memcmp(table.data() + r * bytes, before.data() + r * bytes, bytes)) c.wrong("step");
  }
}

// Texts, vocabularies and sub-words, of which one in four has an id that must be refused.
void train_words(Case& c) {
  const auto ints = [&](std::vector<int64_t> shape, auto&& next) {
    Array array(XLA_FFI_DataType_S32, shape, c.offset);
    for (int64_t k = 0; k < array.size(); ++k) array.as<int32_t>()[k] = static_cast<int32_t>(next(k));
    return array;
  };
  const auto words = [&](std::vector<int64_t> shape, int64_t edge) {
    Array array(XLA_FFI_DataType_U32, shape, c.offset);
    for (int64_t k = 0; k < array.size(); ++k) {
      array.as<uint32_t>()[k] = c.c.one_in(3) ? static_cast<uint32_t>(-edge) : static_cast<uint32_t>(c.c.word());
    }
    return array;
  };
  const int64_t rows = c.rows, stride = 16 * (c.c.one_in(3) ? 7 : c.c.below(5));
  const bool subwords = rows > 0 && c.c.one_in(2), bad = rows > 0 && c.c.one_in(4);
  const int64_t pieces = subwords ? rows + c.c.below(6 * rows) : 0, more = subwords ? c.c.below(50) : 0;
  Array inputs = c.numbers(XLA_FFI_DataType_F32, {rows + more, stride});
  Array outputs = c.numbers(XLA_FFI_DataType_F32, {rows, stride});
  Array ids = ints({std::min<int64_t>(c.number, 2000)},
                   [&](int64_t) { return c.c.one_in(8) ? -1 : c.c.below(rows + 1) - 1; });
  Array alias = ints({rows}, [&](int64_t) { return c.c.below(rows); });
  Array starts = ints({subwords ? rows + 1 : 0}, [&](int64_t k) { return k + (pieces - rows) * k / rows; });
  Array ids_of_pieces = ints({pieces}, [&](int64_t) { return c.c.below(rows + more); });
  Array keep = words({rows}, 1), cut = words({rows}, c.c.below(2));
  Array* const data[] = {&ids, &alias, &starts, &ids_of_pieces};
  Array& spoilt = *data[c.c.below(4)];
  bool refused = false;
  if (bad && spoilt.size()) {
    // Below the first row, or behind the last; of an id, -1 is none, and a bad piece may be of no word.
    const int64_t wrong = c.c.one_in(2) ? -2 - c.c.below(9) : INT32_MAX - c.c.below(9);
    spoilt.as<int32_t>()[c.c.below(spoilt.size())] = static_cast<int32_t>(wrong);
    refused = &spoilt == &ids || &spoilt == &alias;
  }
  embax::Training given{};
  given.inputs = inputs.as<float>();
  given.outputs = outputs.as<float>();
  given.ids = ids.as<int32_t>();
  given.keep = keep.as<uint32_t>();
  given.cut = cut.as<uint32_t>();
  given.alias = alias.as<int32_t>();
  given.starts = subwords ? starts.as<int32_t>() : nullptr;
  given.pieces = subwords ? ids_of_pieces.as<int32_t>() : nullptr;
  given.stride = stride;
  given.input_rows = rows + more;
  given.rows = rows;
  given.number = ids.size();
  given.number_of_pieces = pieces;
  given.window = 1 + c.c.below(c.c.one_in(3) ? 120 : 6);
  given.negative = 1 + c.c.below(c.c.one_in(3) ? 30 : 6);
  given.parts = 1 + c.c.below(4);
  given.seed = c.c.word();
  given.first_rate = 0.1f;
  given.last_rate = static_cast<float>(c.c.below(100)) / 1000;
  given.cbow = c.c.one_in(2);
  int64_t* const sizes[] = {&given.window, &given.negative, &given.parts};
  if (c.c.one_in(8)) *sizes[c.c.below(3)] = -c.c.below(3), refused = true;
  embax_kernels_set_threads(static_cast<int>(c.c.below(4)));
  const std::string before = inputs.copy() + outputs.copy();
  embax::TrainingLoss loss{};
  const char* reason = nullptr;
  const int failed = embax_kernels_train_words(&given, &loss, &reason);
  if (failed ? !bad && !refused : refused) c.wrong("train_words");
  if (failed == 1 && !reason) c.wrong("train_words gave no reason");
  if (failed && inputs.copy() + outputs.copy() != before) c.wrong("train_words wrote");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices choices(data, size);
  void (*const works[])(Case&) = {take, put, combine, pool, step, step, train_words};
  const int64_t work = choices.below(7);
  Case c(choices);
  works[work](c);
  return 0;
}

#if !defined(EMBAX_LIBFUZZER)
int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10;
  uint64_t state = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  const auto start = std::chrono::steady_clock::now();
  int64_t cases = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++cases) {
    uint8_t bytes[32];
    for (uint8_t& byte : bytes) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      byte = static_cast<uint8_t>(state >> 56);
    }
    LLVMFuzzerTestOneInput(bytes, sizeof bytes);
  }
  std::printf("%lld cases, %lld calls with kernels for %s\n", static_cast<long long>(cases),
              static_cast<long long>(embax_kernels_calls()), embax_kernels_isa());
}
#endif
