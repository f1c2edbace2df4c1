// The call from Python that trains word vectors.
//
// Python checks shapes and dtypes. The text and all that leads to rows is data, so it is checked here, before a number
// is written: one bad id is an error of the call.
#include <new>
#include <string>

#include "arguments.h"
#include "exports.h"
#include "float_mode.h"

namespace embax {
namespace {

constexpr int64_t kMostWindow = INT32_MAX, kMostNegative = 1'000'000, kMostThreads = 1024;

[[noreturn]] void refuse(const char* name, const std::string& rule) {
  throw Refused{std::string("embax-kernels: `") + name + "` must be " + rule + "."};
}

[[noreturn]] void refuse_at(const char* name, const int32_t* numbers, int64_t at, const std::string& rule) {
  refuse(name, rule + ", got " + std::to_string(numbers[at]) + " at position " + std::to_string(at));
}

void expect_each_in(const char* name, const int32_t* numbers, int64_t number, int64_t least, int64_t end) {
  for (int64_t i = 0; i < number; ++i) {
    if (numbers[i] < least || numbers[i] >= end) {
      refuse_at(name, numbers, i, "in [" + std::to_string(least) + ", " + std::to_string(end) + ")");
    }
  }
}

void expect_between(const char* name, int64_t value, int64_t most) {
  if (value >= 1 && value <= most) return;
  refuse(name, "between 1 and " + std::to_string(most) + ", got " + std::to_string(value));
}

// Every word of the text has pieces, all of them rows.
void expect_pieces(const Training& given) {
  for (int64_t i = 0; i < given.number; ++i) {
    const int64_t word = given.ids[i];
    if (word < 0) continue;
    const int64_t from = given.starts[word], to = given.starts[word + 1];
    if (from < 0 || from >= to || to > given.number_of_pieces) {
      refuse_at("starts", given.starts, word,
                "rising positions of the " + std::to_string(given.number_of_pieces) + " pieces");
    }
    for (int64_t k = from; k < to; ++k) {
      if (given.pieces[k] < 0 || given.pieces[k] >= given.input_rows) {
        refuse_at("pieces", given.pieces, k, "in [0, " + std::to_string(given.input_rows) + ")");
      }
    }
  }
}

TrainingLoss train_words(Training given) {
  if (given.rows > INT32_MAX) refuse("outputs", "of fewer than 2**31 rows, got " + std::to_string(given.rows));
  expect_between("window", given.window, kMostWindow);
  expect_between("negative", given.negative, kMostNegative);
  expect_between("threads", given.parts, kMostThreads);
  expect_each_in("ids", given.ids, given.number, -1, given.rows);
  expect_each_in("alias", given.alias, given.rows, 0, given.rows);
  if (given.starts) expect_pieces(given);
  // The rate falls over the words, not over what fills up the last chunk.
  while (given.number > 0 && given.ids[given.number - 1] < 0) --given.number;

  // As XLA does: arithmetic on subnormal numbers takes a hundred times as long.
  const FloatModeGuard flushed(flushing(float_mode()));
  OwnThreads on(given.parts);
  const auto row_bytes = static_cast<size_t>(given.stride) * sizeof(float);
  request_large_pages(given.inputs, static_cast<size_t>(given.input_rows) * row_bytes);
  request_large_pages(given.outputs, static_cast<size_t>(given.rows) * row_bytes);
  return kernels().train_words(on.pool(), given);
}

}  // namespace
}  // namespace embax

int embax_kernels_train_words(const embax::Training* training, embax::TrainingLoss* loss, const char** refused) {
  thread_local std::string reason;
  try {
    *loss = embax::train_words(*training);
    return 0;
  } catch (const embax::Refused& error) {
    reason = error.message;
    *refused = reason.c_str();
    return 1;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}
