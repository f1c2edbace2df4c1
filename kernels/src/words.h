// Word vectors by word2vec's skip-gram and CBOW with negative sampling, one window at a time.
//
// For instance, subsampling may turn the sequence "the king holds the crown" into "king holds crown". For the centre
// "holds" a width from 1 to `window` is drawn; with the width 1 its contexts are "king" and "crown". All pairs of the
// window share its noise words (Ji et al. 2016, https://arxiv.org/abs/1604.04661). The noise words of the next window
// are drawn early, so that their rows are in the cache in time. The text is split into parts for threads, which write
// to the same tables without locks (Hogwild, Niu et al. 2011, https://arxiv.org/abs/1106.5730): with several threads,
// results depend on the order of the writes.
//
// Random numbers are drawn in this order: for a sequence, one for each id, which decides whether the word is kept; then
// for each centre, its width and its noise words.
#pragma once

#include "memory.h"
#include "windows.h"

namespace embax::EMBAX_ISA {

// The loss is computed for one window of so many.
constexpr int64_t kSampled = 64;
// With sub-words, the most contexts that share noise words. The weight of a noise word is the number of its contexts.
constexpr int64_t kPooled = 8;
// A row is updated once the number of its pairs times their learning rate reaches this limit. At the usual rate, one
// update has all pairs of a window. At a high rate, such an update would overshoot, and diverge on a text of few words.
constexpr float kPairsTimesRate = 0.4f, kPooledTimesRate = 1.2f;

// The number of rows that are added up at a time.
constexpr int64_t kListed = 64;

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

// The end of piece k, where [0, number) is split into `pieces` pieces of nearly equal size.
inline int64_t piece_end(int64_t number, int64_t pieces, int64_t k) { return number * (k + 1) / pieces; }
inline int64_t pieces_of(int64_t number, int64_t most) { return (number + most - 1) / most; }

// The training on one part of the text.
template <typename S>
class TextPart {
 public:
  TextPart(const Training& training, int64_t number, int64_t from, int64_t to)
      : w_(training), stride_(training.stride), from_(from), to_(to),
        random_(training.seed + static_cast<uint64_t>(number)) {
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
        const int32_t word = w_.ids[i];
        if (random_.bits() > w_.keep[word]) continue;
        kept_[length_++] = word;
        if (length_ <= w_.window + 2) fetch_entering(word);
      }
      if (length_ > 1) train_sequence(begin, i);
    }
    return loss_;
  }

 private:
  struct Window {
    int64_t centre, first, last;  // its words, the centre included
    float rate;
    int64_t blocks;  // of contexts
    const int32_t* noise;
    int64_t contexts() const { return last - first; }
  };

  void carve(Carver& carver) {
    const int64_t most = smaller(2 * w_.window, to_ - from_);
    kept_ = carver.array<int32_t>(to_ - from_);
    for (int32_t*& noise : noise_) noise = carver.array<int32_t>(w_.negative * (by_centre() ? larger(1, most) : 1));
    contexts_ = carver.array<float*>(most);
    errors_ = carver.array<float>(kSlots * (kContexts + 1));
    mean_ = carver.array<float>(stride_);
    current_ = carver.array<float>(stride_);
    error_ = carver.array<float>(stride_);
  }

  // Whether the centre is the input, and its contexts are targets.
  bool by_centre() const { return w_.starts && !w_.cbow; }

  void train_sequence(int64_t begin, int64_t end) {
    const auto rate = [&](int64_t c) {
      const double done = static_cast<double>(begin) + static_cast<double>(end - begin) * c / length_;
      return w_.first_rate + (w_.last_rate - w_.first_rate) * static_cast<float>(done / w_.number);
    };
    Window window = draw(0, rate(0));
    for (int64_t c = 0; c < length_; ++c) {
      Window next{};
      if (c + 1 < length_) {
        next = draw(c + 1, rate(c + 1));
        fetch_for(c + 1);
      }
      double* const loss = windows_++ % kSampled == 0 ? &loss_.sum : nullptr;
      if (loss) loss_.pairs += w_.cbow ? 1 : window.contexts();
      if (w_.cbow) {
        train_cbow(window, loss);
      } else if (w_.starts) {
        train_subwords(window, loss);
      } else {
        train_skipgram(window, loss);
      }
      window = next;
    }
  }

  Window draw(int64_t c, float rate) {
    const int64_t width = 1 + Random::below(w_.window, random_.next());
    int32_t* const noise = noise_[c & 1];
    Window window{c, larger(0, c - width), smaller(length_ - 1, c + width), rate, 1, noise};
    window.blocks = pieces_of(window.contexts(), by_centre()
                                                     ? most_at_once(kPooledTimesRate, rate * (1 + w_.negative), kPooled)
                                                     : most_at_once(kPairsTimesRate, rate, kContexts));
    const int64_t number = w_.negative * (by_centre() ? window.blocks : 1);
    for (int64_t k = 0; k < number; ++k) {
      const uint64_t drawn = random_.next();
      const int64_t row = Random::below(w_.rows, drawn);
      noise[k] = static_cast<uint32_t>(drawn) <= w_.cut[row] ? static_cast<int32_t>(row) : w_.alias[row];
      fetch(output(noise[k]));
    }
    return window;
  }

  // How many pairs one update has: from 1 to `most`; `most` for a rate of 0 or NaN.
  static int64_t most_at_once(float limit, float rate, int64_t most) {
    if (!(rate * static_cast<float>(most) > limit)) return most;
    return larger(1, static_cast<int64_t>(limit / rate));
  }

  // Fetches the rows, other than noise, that no earlier window needs; rows of contexts one window further in advance.
  void fetch_for(int64_t c) const {
    fetch(output(kept_[c]));
    if (by_centre()) for_rows_of(kept_[c], [&](float* row) { fetch(row); });
    if (c + w_.window + 1 < length_) fetch_entering(kept_[c + w_.window + 1]);
  }

  void fetch_entering(int32_t word) const {
    if (by_centre()) return fetch(output(word));
    for_rows_of(word, [&](float* row) { fetch(row); });
  }

  void train_skipgram(const Window& window, double* loss) {
    int64_t number = 0;
    for (int64_t j = window.first; j <= window.last; ++j) {
      if (j != window.centre) contexts_[number++] = w_.inputs + kept_[j] * stride_;
    }
    const int64_t targets = 1 + w_.negative, groups = pieces_of(targets, kPaired);
    for (int64_t block = 0, at = 0; block < window.blocks; ++block) {
      const int64_t block_end = piece_end(number, window.blocks, block);
      for (int64_t group = 0, t = 0; group < groups; ++group) {
        targets_.clear(window.rate, 1);
        for (const int64_t end = piece_end(targets, groups, group); t < end; ++t) add_target(window, t);
        update_pairs(contexts_ + at, block_end - at, targets_, stride_, errors_, loss);
      }
      at = block_end;
    }
  }

  void train_cbow(const Window& window, double* loss) {
    const int64_t c = window.centre;
    const auto contexts = [&](auto&& body) {
      for (int64_t j = window.first; j <= window.last; ++j) {
        if (j != c) for_rows_of(kept_[j], body);
      }
    };
    int64_t rows = 0;
    for (int64_t j = window.first; j <= window.last; ++j) rows += j != c ? rows_of(kept_[j]) : 0;
    take_mean(contexts, rows, mean_);
    const int64_t targets = 1 + w_.negative, groups = pieces_of(targets, kSlots);
    for (int64_t group = 0, t = 0; group < groups; ++group) {
      targets_.clear(window.rate, 1);
      for (const int64_t end = piece_end(targets, groups, group); t < end; ++t) add_target(window, t);
      update_mean(mean_, targets_, stride_, error_, group == 0, loss);
    }
    by_lists(contexts, [&](int64_t number) { move_rows(list_, number, stride_, error_); });
  }

  // Target 0 is the centre, the others are noise. A noise word that equals the centre gets the weight 0.
  void add_target(const Window& window, int64_t t) {
    const int32_t centre = kept_[window.centre];
    if (t) {
      targets_.add_noise(output(window.noise[t - 1]), window.noise[t - 1] == centre ? 0.0f : 1.0f);
    } else {
      targets_.add(output(centre));
    }
  }

  // Pairs the mean of the centre's rows with the words around it and with noise. As in fastText, each row gets the
  // whole update of the mean. The contexts of a block share noise words; a noise word counts once for each context that
  // differs from it.
  void train_subwords(const Window& window, double* loss) {
    const int32_t word = kept_[window.centre];
    const auto centre = [&](auto&& body) { for_rows_of(word, body); };
    take_mean(centre, rows_of(word), mean_);
    const int64_t number = window.contexts();
    for (int64_t block = 0, at = 0; block < window.blocks; ++block) {
      const int64_t block_end = piece_end(number, window.blocks, block), contexts = block_end - at;
      const int64_t targets = contexts + w_.negative, groups = pieces_of(targets, kSlots);
      const float* mean = mean_;
      if (block) sum_of(mean_, error_, stride_, current_), mean = current_;
      for (int64_t group = 0, t = 0; group < groups; ++group) {
        targets_.clear(window.rate, static_cast<float>(contexts));
        for (const int64_t end = piece_end(targets, groups, group); t < end; ++t) {
          if (t < contexts) {
            targets_.add(output(context(window, at + t)));
            continue;
          }
          const int32_t noise = window.noise[block * w_.negative + t - contexts];
          int64_t others = 0;
          for (int64_t k = at; k < block_end; ++k) others += context(window, k) != noise;
          targets_.add_noise(output(noise), static_cast<float>(others) / static_cast<float>(contexts));
        }
        update_mean(mean, targets_, stride_, error_, group == 0 && block == 0, loss);
      }
      at = block_end;
    }
    by_lists(centre, [&](int64_t number) { move_rows(list_, number, stride_, error_); });
  }

  template <typename R>
  void take_mean(R&& rows, int64_t count, float* mean) {
    const float factor = 1.0f / static_cast<float>(count);
    bool first = true;
    by_lists(rows, [&](int64_t number) {
      add_rows(list_, number, factor, first, stride_, mean);
      first = false;
    });
  }

  // Puts the rows into the list in pieces, and calls body(number) for each piece of `number` rows.
  template <typename R, typename F>
  void by_lists(R&& rows, F&& body) {
    int64_t number = 0;
    rows([&](float* row) {
      list_[number++] = row;
      if (number == kListed) {
        body(number);
        number = 0;
      }
    });
    if (number) body(number);
  }

  int32_t context(const Window& window, int64_t k) const {
    const int64_t j = window.first + k;
    return kept_[j < window.centre ? j : j + 1];
  }

  float* output(int64_t word) const { return w_.outputs + word * stride_; }

  void fetch(const float* row) const {
    const int64_t length = smaller(stride_, kFetched);
    for (int64_t j = 0; j < length; j += 16) __builtin_prefetch(row + j, 1, 3);
  }

  int64_t rows_of(int64_t word) const { return w_.starts ? w_.starts[word + 1] - w_.starts[word] : 1; }

  template <typename F>
  void for_rows_of(int64_t word, F&& body) const {
    if (!w_.starts) return body(w_.inputs + word * stride_);
    for (int64_t k = w_.starts[word]; k < w_.starts[word + 1]; ++k) body(w_.inputs + w_.pieces[k] * stride_);
  }

  const Training& w_;
  const S stride_;
  const int64_t from_, to_;
  Random random_;
  TrainingLoss loss_{};
  int64_t windows_ = 0, length_ = 0;
  Targets targets_;
  int32_t *kept_, *noise_[2];
  float **contexts_, *list_[kListed], *errors_, *mean_, *current_, *error_;
};

// Where part k of the text ends: after the next end of a sequence, if there is one before the next part.
inline int64_t part_end(const Training& training, int64_t k) {
  const int64_t end = piece_end(training.number, training.parts, k);
  const int64_t latest = k + 1 < training.parts ? piece_end(training.number, training.parts, k + 1) : end;
  for (int64_t i = end; i < latest; ++i) {
    if (i > 0 && training.ids[i - 1] < 0) return i;
  }
  return end;
}

template <typename S>
inline TrainingLoss train_parts(const Pool& pool, const Training& training) {
  Carver carver;
  carver.array<TrainingLoss>(training.parts);
  carver.start(scratch(Holder::call, carver.used()));
  TrainingLoss* const losses = carver.array<TrainingLoss>(training.parts);
  in_parallel(pool, training.parts, [&](int64_t k) {
    losses[k] = TextPart<S>(training, k, k ? part_end(training, k - 1) : 0, part_end(training, k)).train();
  });
  TrainingLoss total{};
  for (int64_t k = 0; k < training.parts; ++k) {
    total.sum += losses[k].sum;
    total.pairs += losses[k].pairs;
  }
  return total;
}

inline TrainingLoss train_words(const Pool& pool, const Training& training) {
  return training.stride == kUsualStride ? train_parts<Stride<kUsualStride>>(pool, training)
                                         : train_parts<Stride<0>>(pool, training);
}

}  // namespace embax::EMBAX_ISA
