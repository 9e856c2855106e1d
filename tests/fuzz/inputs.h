// Inputs of the fuzzer: settings of a sampler (32 bytes), nine u16 sizes, and the .idx, .bin and .lang files of up to three
// corpora, one after the other. Valid ones, and what is done to them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "memory_file.h"

namespace fuzz {

using megatron_lpr::Bytes;
using Random = std::mt19937_64;

constexpr std::size_t kSettings = 32;
constexpr std::size_t kCorpora = 3;
constexpr std::size_t kHead = kSettings + 2 * 3 * kCorpora;

template <typename T>
void put(Bytes& bytes, T value) {
  const auto* first = reinterpret_cast<const unsigned char*>(&value);
  bytes.insert(bytes.end(), first, first + sizeof(T));
}

// The three files of a corpus of a few documents, some of several sequences.
inline std::vector<Bytes> valid_corpus(Random& random) {
  constexpr std::pair<std::uint8_t, unsigned> kTypes[] = {{1, 1}, {3, 2}, {4, 4}, {5, 8}, {8, 2}};
  const auto [code, width] = kTypes[random() % 5];
  std::vector<std::int32_t> lengths(1 + random() % 6);
  for (auto& length : lengths) length = static_cast<std::int32_t>(2 + random() % 5);
  std::vector<std::int64_t> documents{0};
  while (documents.back() < static_cast<std::int64_t>(lengths.size()))
    documents.push_back(std::min<std::int64_t>(documents.back() + 1 + random() % 2, lengths.size()));
  Bytes idx{'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0}, bin, lang{'L', 'P', 'R', 'L', 'A', 'N', 'G', '1'};
  put<std::uint64_t>(idx, 1);
  put<std::uint8_t>(idx, code);
  put<std::uint64_t>(idx, lengths.size());
  put<std::uint64_t>(idx, documents.size());
  std::int64_t tokens = 0;
  for (const auto length : lengths) put(idx, length);
  for (const auto length : lengths) {
    put<std::int64_t>(idx, tokens * width);
    tokens += length;
  }
  for (const auto document : documents) put(idx, document);
  for (std::int64_t token = 0; token < tokens; ++token) {
    bin.push_back(static_cast<unsigned char>(random() % 100));
    bin.insert(bin.end(), width - 1, 0);
  }
  const std::uint64_t runs = std::min<std::uint64_t>(1 + random() % 4, tokens);
  put(lang, runs);
  for (std::uint64_t first = 0; first < runs; ++first) put(lang, first);
  for (std::uint64_t first = 0; first < runs; ++first) put<std::uint16_t>(lang, first % 3);
  return {idx, bin, lang};
}

inline Bytes valid_input(Random& random) {
  Bytes input, body;
  for (std::size_t i = 0; i < kSettings; ++i) input.push_back(static_cast<unsigned char>(random()));
  input[0] = 0;  // nothing is cut short
  for (std::size_t corpus = 0; corpus < kCorpora; ++corpus)
    for (const Bytes& file : valid_corpus(random)) {
      put<std::uint16_t>(input, file.size());
      body.insert(body.end(), file.begin(), file.end());
    }
  input.insert(input.end(), body.begin(), body.end());
  return input;
}

// Writes a small number where an index has an offset or the first sequence of a document: they go back, or leave gaps.
inline void move_boundary(Bytes& input, Random& random) {
  std::size_t place = kHead;
  std::uint16_t bytes = 0;
  for (std::size_t file = 0, last = 3 * (random() % kCorpora); file < last; ++file) {
    std::memcpy(&bytes, &input[kSettings + 2 * file], sizeof(bytes));
    place += bytes;
  }
  if (place + 34 > input.size()) return;
  const std::uint64_t sequences = input[place + 18];
  place += 34 + 4 * sequences + 8 * (random() % (2 * sequences + 1));
  const std::uint64_t value = random() % 48;
  if (place + sizeof(value) <= input.size()) std::memcpy(&input[place], &value, sizeof(value));
}

inline void mutate(Bytes& input, Random& random) {
  constexpr std::uint64_t kInteresting[] = {0, 1, 2, 7, 8, 1ull << 31, (1ull << 31) - 1, 1ull << 32, 1ull << 61,
                                            1ull << 63, (1ull << 63) - 1, ~0ull, ~0ull - 1, ~0ull / 12, ~0ull / 12 + 1};
  if (input.size() <= kHead) input.resize(kHead + 1);
  if (random() % 3 == 0) return move_boundary(input, random);
  // Mostly the files: of the settings every one is valid.
  const std::size_t at = random() % 16 == 0 ? random() % kHead : kHead + random() % (input.size() - kHead);
  const std::size_t last = input.size() - at;
  const std::uint64_t value = kInteresting[random() % (sizeof(kInteresting) / sizeof(*kInteresting))];
  const std::size_t some = 1 + random() % 9;
  switch (random() % 8) {
    case 0: input[at] ^= static_cast<unsigned char>(1u << random() % 8); break;
    case 1: input[at] = static_cast<unsigned char>(random()); break;
    case 2: std::memcpy(&input[at], &value, std::min<std::size_t>(8, last)); break;
    case 3: std::memcpy(&input[at], &value, std::min<std::size_t>(4, last)); break;
    case 4: input.resize(at + 1); break;  // truncated
    case 5: input.insert(input.begin() + at, some, static_cast<unsigned char>(random())); break;
    case 6: input[0] = static_cast<unsigned char>(random()); break;  // a file is cut short while it is read
    default: input.erase(input.begin() + at, input.begin() + at + std::min(some, last)); break;
  }
}

}  // namespace fuzz
