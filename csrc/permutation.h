// A keyed permutation of {0, ..., size - 1} with random access and no table.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>

namespace megatron_lpr {

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;

// The finaliser of splitmix64: a bijection of 64-bit words in which every input bit reaches every output bit.
inline std::uint64_t mix(std::uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ULL;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebULL;
  return word ^ (word >> 31);
}

// A random word as a number below `bound`, by its upper bits.
inline std::uint64_t below(std::uint64_t word, std::uint64_t bound) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(word) * bound) >> 64);
}

// What selects a permutation: the run's seed, what is permuted (a corpus' digest), and the pass over it.
struct PermutationKey {
  std::uint64_t seed;
  std::uint64_t stream;
  std::uint64_t epoch;

  std::uint64_t hash() const { return mix(mix(mix(seed + kGolden) + stream + kGolden) + epoch + kGolden); }
};

// A Feistel network on a rectangle of rows x columns cells that just holds `size` (a generalised Feistel cipher:
// Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): rounds add a keyed function of the
// column to the row, and of the row to the column, modulo their numbers. Images outside the range are permuted
// again until they fall inside (cycle walking); above 16 x 16 cells that is less than one index in 16.
class Permutation {
 public:
  Permutation(std::uint64_t size, const PermutationKey& key) : size_(size) {
    if (size == 0 || size > kMaxSize) throw std::invalid_argument("a permutation needs 1 to 2^63 elements");
    // Any number of columns is right; the square root leaves the fewest cells outside.
    columns_ = std::max(kMinSide, static_cast<std::uint64_t>(std::sqrt(static_cast<double>(size))));
    rows_ = std::max(kMinSide, (size - 1) / columns_ + 1);
    std::uint64_t state = key.hash();
    for (auto& round_key : round_keys_) round_key = mix(state += kGolden);
  }

  std::uint64_t operator()(std::uint64_t index) const {
    if (index >= size_) throw std::out_of_range("permutation index past the end");
    do {
      std::uint64_t row = index / columns_;
      std::uint64_t column = index % columns_;
      for (std::size_t round = 0; round < kRounds; round += 2) {
        row = add(row, shift(column, round, rows_), rows_);
        column = add(column, shift(row, round + 1, columns_), columns_);
      }
      index = row * columns_ + column;
    } while (index >= size_);
    return index;
  }

  // The index that has this image.
  std::uint64_t inverse(std::uint64_t image) const {
    if (image >= size_) throw std::out_of_range("permutation image past the end");
    do {
      std::uint64_t row = image / columns_;
      std::uint64_t column = image % columns_;
      for (std::size_t round = kRounds; round > 0; round -= 2) {
        column = add(column, columns_ - shift(row, round - 1, columns_), columns_);
        row = add(row, rows_ - shift(column, round - 2, rows_), rows_);
      }
      image = row * columns_ + column;
    } while (image >= size_);
    return image;
  }

 private:
  static constexpr std::uint64_t kMaxSize = 1ULL << 63;
  static constexpr std::size_t kRounds = 8;
  // A network on fewer cells has too few distinct round functions to shuffle tiny ranges evenly.
  static constexpr std::uint64_t kMinSide = 16;

  std::uint64_t shift(std::uint64_t word, std::size_t round, std::uint64_t bound) const {
    word = (word ^ round_keys_[round]) * 0xbf58476d1ce4e5b9ULL;
    return below((word ^ (word >> 32)) * 0x94d049bb133111ebULL, bound);
  }

  static std::uint64_t add(std::uint64_t value, std::uint64_t summand, std::uint64_t modulus) {
    const std::uint64_t sum = value + summand;
    return sum >= modulus ? sum - modulus : sum;
  }

  std::uint64_t size_;
  std::uint64_t columns_;
  std::uint64_t rows_;
  std::array<std::uint64_t, kRounds> round_keys_{};
};

}  // namespace megatron_lpr
