// A keyed permutation of {0, ..., size - 1} with random access and no table.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>

namespace megatron_lpr {

// The finaliser of splitmix64: a bijection of 64-bit words in which every input bit reaches every output bit.
inline std::uint64_t mix(std::uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ULL;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebULL;
  return word ^ (word >> 31);
}

// What selects a permutation: the run's seed, what is permuted (a corpus' digest), and the pass over it.
struct PermutationKey {
  std::uint64_t seed;
  std::uint64_t stream;
  std::uint64_t epoch;
};

// A balanced Feistel network on the smallest even number of bits that holds `size`. Images outside the range
// are permuted again until they fall inside (cycle walking): fewer than 4 steps on average.
class Permutation {
 public:
  Permutation(std::uint64_t size, const PermutationKey& key) : size_(size) {
    if (size == 0 || size > kMaxSize) throw std::invalid_argument("a permutation needs 1 to 2^63 elements");
    while (2 * half_bits_ < 64 && ((size - 1) >> (2 * half_bits_)) != 0) ++half_bits_;
    std::uint64_t state = mix(mix(mix(key.seed + kGolden) + key.stream + kGolden) + key.epoch + kGolden);
    for (auto& round_key : round_keys_) round_key = mix(state += kGolden);
  }

  std::uint64_t operator()(std::uint64_t index) const {
    if (index >= size_) throw std::out_of_range("permutation index past the end");
    do {
      index = encrypt(index);
    } while (index >= size_);
    return index;
  }

 private:
  static constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;
  static constexpr std::uint64_t kMaxSize = 1ULL << 63;
  static constexpr int kRounds = 8;

  std::uint64_t encrypt(std::uint64_t index) const {
    const std::uint64_t mask = (1ULL << half_bits_) - 1;
    std::uint64_t left = index >> half_bits_;
    std::uint64_t right = index & mask;
    for (const std::uint64_t round_key : round_keys_) {
      const std::uint64_t next = left ^ (mix(right ^ round_key) & mask);
      left = right;
      right = next;
    }
    return (left << half_bits_) | right;
  }

  std::uint64_t size_;
  // At least 4: a network on fewer bits has too few distinct round functions to shuffle tiny ranges evenly.
  int half_bits_ = 4;
  std::array<std::uint64_t, kRounds> round_keys_{};
};

}  // namespace megatron_lpr
