// XLA's call that trains word vectors.
//
// The text and all that leads to rows is data, so it is checked here, before a number is written: one bad id is an
// error of the call.
#include "arguments.h"
#include "exports.h"

namespace embax {
namespace {

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

constexpr int64_t kMostWindow = INT32_MAX, kMostNegative = 1'000'000, kMostThreads = 1024;

const int32_t* numbers(const Named& named) { return static_cast<const int32_t*>(named.data()); }

[[noreturn]] void refuse_at(const Named& named, int64_t at, const std::string& rule) {
  throw Refused{std::string("embax-kernels: `") + named.name + "` must be " + rule + ", got " +
                std::to_string(numbers(named)[at]) + " at position " + std::to_string(at) + "."};
}

void expect_each_in(const Named& named, int64_t least, int64_t end) {
  const int32_t* const x = numbers(named);
  for (int64_t i = 0; i < named.size(); ++i) {
    if (x[i] < least || x[i] >= end) {
      refuse_at(named, i, "in [" + std::to_string(least) + ", " + std::to_string(end) + ")");
    }
  }
}

void expect_between(const Named& named, const char* attribute, int64_t value, int64_t most) {
  if (value >= 1 && value <= most) return;
  refuse(named, std::string("with a ") + attribute + " between 1 and " + std::to_string(most) + ", which is " +
                    std::to_string(value));
}

// Every word of the text has pieces, all of them rows.
void expect_pieces(const Named& ids, const Named& starts, const Named& pieces, int64_t rows) {
  for (int64_t i = 0; i < ids.size(); ++i) {
    const int64_t word = numbers(ids)[i];
    if (word < 0) continue;
    const int64_t from = numbers(starts)[word], to = numbers(starts)[word + 1];
    if (from < 0 || from >= to || to > pieces.size()) {
      refuse_at(starts, word, "rising positions of the " + std::to_string(pieces.size()) + " pieces");
    }
    for (int64_t k = from; k < to; ++k) {
      if (numbers(pieces)[k] < 0 || numbers(pieces)[k] >= rows) {
        refuse_at(pieces, k, "in [0, " + std::to_string(rows) + ")");
      }
    }
  }
}

void expect_numbers(const Named& named, ffi::DataType dtype, int64_t number) {
  expect_dtype(named, dtype);
  expect_shape(named, {number});
}

ffi::Error train_words(ffi::ThreadPool threads, In inputs, In outputs, In ids, In keep, In cut, In alias, In starts,
                       In pieces, In rates, In seed, Out new_inputs, Out new_outputs, Out loss, int64_t window,
                       int64_t negative, int64_t parts, int32_t cbow) {
  return guarded([&] {
    const Named of_inputs{"inputs", inputs}, of_outputs{"outputs", outputs}, of_ids{"ids", ids};
    const Named of_alias{"alias", alias}, of_starts{"starts", starts}, of_pieces{"pieces", pieces};
    const Named of_loss{"loss", *loss};
    for (const Named& table : {of_inputs, of_outputs}) {
      expect_dtype(table, ffi::F32);
      if (table.rank() != 2 || table.axis(1) % 16) refuse(table, "of two axes, the second a multiple of 16");
    }
    const int64_t rows = of_outputs.axis(0), stride = of_outputs.axis(1);
    if (rows > INT32_MAX) refuse(of_outputs, "fewer than 2**31 rows");
    expect_in_place(of_inputs, {"new_inputs", *new_inputs});
    expect_in_place(of_outputs, {"new_outputs", *new_outputs});
    expect_numbers(of_ids, ffi::S32, of_ids.size());
    expect_numbers({"keep", keep}, ffi::U32, rows);
    expect_numbers({"cut", cut}, ffi::U32, rows);
    expect_numbers(of_alias, ffi::S32, rows);
    const bool subwords = of_starts.size() > 0;
    expect_numbers(of_starts, ffi::S32, subwords ? rows + 1 : 0);
    expect_numbers(of_pieces, ffi::S32, subwords ? of_pieces.size() : 0);
    expect_shape(of_inputs, {subwords ? of_inputs.axis(0) : rows, stride});
    expect_numbers({"rates", rates}, ffi::F32, 2);
    expect_numbers({"seed", seed}, ffi::U32, 2);
    expect_numbers(of_loss, ffi::F32, 2);
    expect_between(of_ids, "window", window, kMostWindow);
    expect_between(of_ids, "number of noise words", negative, kMostNegative);
    expect_between(of_ids, "number of threads", parts, kMostThreads);
    expect_each_in(of_ids, -1, rows);
    expect_each_in(of_alias, 0, rows);
    if (subwords) expect_pieces(of_ids, of_starts, of_pieces, of_inputs.axis(0));

    Training training{};
    training.inputs = static_cast<float*>(new_inputs->untyped_data());
    training.outputs = static_cast<float*>(new_outputs->untyped_data());
    training.stride = stride;
    training.rows = rows;
    training.ids = numbers(of_ids);
    // The rate falls over the words, not over what fills up the last chunk.
    training.number = of_ids.size();
    while (training.number > 0 && training.ids[training.number - 1] < 0) --training.number;
    training.keep = static_cast<const uint32_t*>(keep.untyped_data());
    training.cut = static_cast<const uint32_t*>(cut.untyped_data());
    training.alias = numbers(of_alias);
    training.starts = subwords ? numbers(of_starts) : nullptr;
    training.pieces = subwords ? numbers(of_pieces) : nullptr;
    training.window = window;
    training.negative = negative;
    training.parts = parts;
    training.cbow = cbow != 0;
    training.first_rate = static_cast<const float*>(rates.untyped_data())[0];
    training.last_rate = static_cast<const float*>(rates.untyped_data())[1];
    const auto* const halves = static_cast<const uint32_t*>(seed.untyped_data());
    training.seed = uint64_t{halves[0]} << 32 | halves[1];

    Threads on(threads);
    request_large_pages(inputs);
    request_large_pages(outputs);
    const TrainingLoss found = kernels().train_words(on.pool(), training);
    auto* const out = static_cast<float*>(of_loss.data());
    out[0] = static_cast<float>(found.sum);
    out[1] = static_cast<float>(found.pairs);
  });
}

}  // namespace
}  // namespace embax

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxTrainWords, embax::train_words,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("negative")
                                  .Attr<int64_t>("threads")
                                  .Attr<int32_t>("cbow"));
