// Word vectors by word2vec's skip-gram and CBOW with negative sampling, a window at a time.
//
// In the sequence "the king holds the crown", subsampling may drop "the". Of "king holds crown", the centre "holds" draws
// a width of 1 to `window`, and so has the contexts "king" and "crown"; all pairs of the window share its noise words
// (Ji et al. 2016, https://arxiv.org/abs/1604.04661). Noise words of the next window are drawn early, so that their rows
// are in the cache in time. A long text splits into parts for threads, which write to the same tables without locks
// (Hogwild, Niu et al. 2011, https://arxiv.org/abs/1106.5730): results then depend on the order of the writes.
//
// Random numbers come in this order: for a sequence, one for each id (is it kept?); then for each centre its width and
// its noise words.
#pragma once

#include "memory.h"
#include "windows.h"

namespace embax::EMBAX_ISA {

// Every so many windows, their loss is computed.
constexpr int64_t kSampled = 64;
// Contexts that share noise words with sub-words, where noise counts as often as there are contexts.
constexpr int64_t kPooled = 8;

inline uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2714064.2660195.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(mixed(seed)) {}
  uint64_t next() { return mixed(state_ += 0x9E3779B97F4A7C15ull); }
  uint32_t bits() { return static_cast<uint32_t>(next()); }
  // Below `number`, which is less than 2^32, of the upper half of the bits.
  static int64_t below(int64_t number, uint64_t drawn) {
    return static_cast<int64_t>(((drawn >> 32) * static_cast<uint64_t>(number)) >> 32);
  }

 private:
  uint64_t state_;
};

// Pieces of nearly one size: the end of piece k of `pieces` of [0, number).
inline int64_t piece_end(int64_t number, int64_t pieces, int64_t k) { return number * (k + 1) / pieces; }
inline int64_t pieces_of(int64_t number, int64_t most) { return (number + most - 1) / most; }

// The training on one part of the text.
class TextPart {
 public:
  TextPart(const Training& training, int64_t number, int64_t from, int64_t to)
      : w_(training), from_(from), to_(to), random_(training.seed + static_cast<uint64_t>(number)) {
    Carver carver;
    carve(carver);
    carver.start(scratch(Holder::part, carver.used()));
    carve(carver);
  }

  TrainingLoss train() {
    for (int64_t i = from_; i < to_; ++i) {
      const int64_t begin = i;
      length_ = 0;
      for (; i < to_ && w_.ids[i] >= 0; ++i) {
        if (random_.bits() <= w_.keep[w_.ids[i]]) kept_[length_++] = w_.ids[i];
      }
      if (length_ > 1) train_sequence(begin, i);
    }
    return loss_;
  }

 private:
  struct Window {
    int64_t first, last;  // its words, the centre included
    int64_t contexts() const { return last - first; }
    const int32_t* noise;
  };

  void carve(Carver& carver) {
    const int64_t most = 2 * w_.window;
    kept_ = carver.array<int32_t>(to_ - from_);
    for (int32_t*& noise : noise_) noise = carver.array<int32_t>(w_.negative * noise_groups(most));
    contexts_ = carver.array<float*>(most);
    copies_ = carver.array<float>(kPaired * w_.stride);
    errors_ = carver.array<float>(kSlots * (kContexts + 1));
    mean_ = carver.array<float>(w_.stride);
    current_ = carver.array<float>(w_.stride);
    error_ = carver.array<float>(w_.stride);
  }

  int64_t noise_groups(int64_t contexts) const { return w_.starts && !w_.cbow ? pieces_of(contexts, kPooled) : 1; }

  void train_sequence(int64_t begin, int64_t end) {
    Window window = draw(0);
    for (int64_t c = 0; c < length_; ++c) {
      Window next{};
      if (c + 1 < length_) {
        next = draw(c + 1);
        fetch_for(c + 1);
      }
      const double done = static_cast<double>(begin) + static_cast<double>(end - begin) * c / length_;
      rate_ = w_.first_rate + (w_.last_rate - w_.first_rate) * static_cast<float>(done / w_.number);
      double* const loss = windows_++ % kSampled == 0 ? &loss_.sum : nullptr;
      if (loss) loss_.pairs += w_.cbow ? 1 : window.contexts();
      if (w_.cbow) {
        train_cbow(c, window, loss);
      } else if (w_.starts) {
        train_subwords(c, window, loss);
      } else {
        train_skipgram(c, window, loss);
      }
      window = next;
    }
  }

  Window draw(int64_t c) {
    const int64_t width = 1 + Random::below(w_.window, random_.next());
    Window window{larger(0, c - width), smaller(length_ - 1, c + width), noise_[c & 1]};
    const int64_t number = w_.negative * noise_groups(window.contexts());
    for (int64_t k = 0; k < number; ++k) {
      const uint64_t drawn = random_.next();
      const int64_t row = Random::below(w_.rows, drawn);
      noise_[c & 1][k] = static_cast<uint32_t>(drawn) <= w_.cut[row] ? static_cast<int32_t>(row) : w_.alias[row];
      fetch_to_write(output(noise_[c & 1][k]), row_bytes());
    }
    return window;
  }

  // The rows that a window needs for the first time, besides its noise.
  void fetch_for(int64_t c) const {
    fetch_to_write(output(kept_[c]), row_bytes());
    const bool centre = w_.starts && !w_.cbow;
    const int64_t entering = centre ? c : c + w_.window;
    if (entering < length_) {
      for_rows_of(kept_[entering], [&](float* row) { fetch_to_write(row, row_bytes()); });
    }
    if (centre && c + w_.window < length_) fetch_to_write(output(kept_[c + w_.window]), row_bytes());
  }

  void train_skipgram(int64_t c, const Window& window, double* loss) {
    int64_t number = 0;
    for (int64_t j = window.first; j <= window.last; ++j) {
      if (j != c) contexts_[number++] = w_.inputs + kept_[j] * w_.stride;
    }
    const int64_t targets = 1 + w_.negative, groups = pieces_of(targets, kPaired), blocks = pieces_of(number, kContexts);
    for (int64_t block = 0, at = 0; block < blocks; ++block) {
      const int64_t block_end = piece_end(number, blocks, block);
      for (int64_t group = 0, t = 0; group < groups; ++group) {
        targets_.clear();
        for (const int64_t end = piece_end(targets, groups, group); t < end; ++t) add_target(c, window, t);
        update_pairs(contexts_ + at, block_end - at, targets_, w_.stride, copies_, errors_, loss);
      }
      at = block_end;
    }
  }

  void train_cbow(int64_t c, const Window& window, double* loss) {
    int64_t rows = 0;
    const auto each_row = [&](auto&& body) {
      for (int64_t j = window.first; j <= window.last; ++j) {
        if (j != c) for_rows_of(kept_[j], body);
      }
    };
    clear_row(current_, w_.stride);
    clear_row(error_, w_.stride);
    each_row([&](float* row) { add_row(current_, row, w_.stride), ++rows; });
    scale_row(current_, 1.0f / static_cast<float>(rows), w_.stride);
    const int64_t targets = 1 + w_.negative, groups = pieces_of(targets, kSlots);
    for (int64_t group = 0, t = 0; group < groups; ++group) {
      targets_.clear();
      for (const int64_t end = piece_end(targets, groups, group); t < end; ++t) add_target(c, window, t);
      update_mean(current_, targets_, w_.stride, error_, loss);
    }
    each_row([&](float* row) { add_row(row, error_, w_.stride); });
  }

  // Target 0 is the centre, the others are noise. Noise that is the centre does not count.
  void add_target(int64_t c, const Window& window, int64_t t) {
    const int32_t word = t ? window.noise[t - 1] : kept_[c];
    targets_.add(output(word), t ? 0.0f : 1.0f, t && word == kept_[c] ? 0.0f : 1.0f, rate_);
  }

  // The mean of the centre's rows with the words around it and with noise. As in fastText, each row moves as the mean
  // has to. Up to kPooled contexts share noise words, which count once for each context that is another word.
  void train_subwords(int64_t c, const Window& window, double* loss) {
    int64_t rows = 0;
    clear_row(mean_, w_.stride);
    clear_row(error_, w_.stride);
    for_rows_of(kept_[c], [&](float* row) { add_row(mean_, row, w_.stride), ++rows; });
    scale_row(mean_, 1.0f / static_cast<float>(rows), w_.stride);
    const int64_t number = window.contexts(), blocks = pieces_of(number, kPooled);
    for (int64_t block = 0, at = 0; block < blocks; ++block) {
      const int64_t block_end = piece_end(number, blocks, block), contexts = block_end - at;
      const int64_t targets = contexts + w_.negative, groups = pieces_of(targets, kSlots);
      sum_rows(mean_, error_, w_.stride, current_);
      for (int64_t group = 0, t = 0; group < groups; ++group) {
        targets_.clear();
        for (const int64_t end = piece_end(targets, groups, group); t < end; ++t) {
          if (t < contexts) {
            targets_.add(output(context(c, window, at + t)), 1, 1, rate_);
            continue;
          }
          const int32_t word = window.noise[block * w_.negative + t - contexts];
          int64_t others = 0;
          for (int64_t k = at; k < block_end; ++k) others += context(c, window, k) != word;
          targets_.add(output(word), 0, static_cast<float>(others), rate_);
        }
        update_mean(current_, targets_, w_.stride, error_, loss);
      }
      at = block_end;
    }
    for_rows_of(kept_[c], [&](float* row) { add_row(row, error_, w_.stride); });
  }

  int32_t context(int64_t c, const Window& window, int64_t k) const {
    const int64_t j = window.first + k;
    return kept_[j < c ? j : j + 1];
  }

  float* output(int64_t word) const { return w_.outputs + word * w_.stride; }
  int64_t row_bytes() const { return w_.stride * static_cast<int64_t>(sizeof(float)); }

  template <typename F>
  void for_rows_of(int64_t word, F&& body) const {
    if (!w_.starts) return body(w_.inputs + word * w_.stride);
    for (int64_t k = w_.starts[word]; k < w_.starts[word + 1]; ++k) body(w_.inputs + w_.pieces[k] * w_.stride);
  }

  const Training& w_;
  const int64_t from_, to_;
  Random random_;
  TrainingLoss loss_{};
  int64_t windows_ = 0, length_ = 0;
  float rate_ = 0;
  Targets targets_;
  int32_t *kept_, *noise_[2];
  float **contexts_, *copies_, *errors_, *mean_, *current_, *error_;
};

// Where part k of the text ends: behind the next end of a sequence, if one comes before the next part.
inline int64_t part_end(const Training& training, int64_t k) {
  const int64_t end = piece_end(training.number, training.parts, k);
  const int64_t latest = k + 1 < training.parts ? piece_end(training.number, training.parts, k + 1) : end;
  for (int64_t i = end; i < latest; ++i) {
    if (i > 0 && training.ids[i - 1] < 0) return i;
  }
  return end;
}

inline TrainingLoss train_words(const Pool& pool, const Training& training) {
  Carver carver;
  carver.array<TrainingLoss>(training.parts);
  carver.start(scratch(Holder::call, carver.used()));
  TrainingLoss* const losses = carver.array<TrainingLoss>(training.parts);
  in_parallel(pool, training.parts, [&](int64_t k) {
    losses[k] = TextPart(training, k, k ? part_end(training, k - 1) : 0, part_end(training, k)).train();
  });
  TrainingLoss total{};
  for (int64_t k = 0; k < training.parts; ++k) {
    total.sum += losses[k].sum;
    total.pairs += losses[k].pairs;
  }
  return total;
}

}  // namespace embax::EMBAX_ISA
