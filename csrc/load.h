// Single numbers of a file at any place: by way of blocks that each thread keeps, so that neighbours, and the first
// steps of every search, cost no system call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "file.h"

namespace megatron_lpr {

class BlockCache {
 public:
  static constexpr std::uint64_t kBytes = 4096;

  static BlockCache& of_thread() {
    thread_local BlockCache cache;
    return cache;
  }

  // Block `number` of a file; of the last one no more than the file has.
  const unsigned char* find(const File& file, std::uint64_t number) {
    if (!blocks_) blocks_.reset(static_cast<Block*>(std::calloc(kBlocks, sizeof(Block))));
    if (!blocks_) throw std::bad_alloc();
    Block& block = blocks_[(number + (file.id() << 32)) * 0x9e3779b97f4a7c15ULL >> 54];
    if (block.file != file.id() || block.number != number) {
      block.file = 0;  // what a failed read leaves is nobody's
      file.read(number * kBytes, std::min(kBytes, file.size() - number * kBytes), block.bytes);
      block.file = file.id();
      block.number = number;
    }
    return block.bytes;
  }

 private:
  static constexpr std::size_t kBlocks = 1 << 10;

  struct Block {
    std::uint64_t file;  // 0: none
    std::uint64_t number;
    unsigned char bytes[kBytes];
  };

  struct Free {
    void operator()(Block* blocks) const { std::free(blocks); }
  };

  std::unique_ptr<Block[], Free> blocks_;  // memory that the kernel gives where a block is used
};

template <typename T>
T load(const File& file, std::uint64_t offset) {
  if (offset > file.size() || sizeof(T) > file.size() - offset) throw std::logic_error("a number past the file's end");
  T value;
  auto* out = reinterpret_cast<unsigned char*>(&value);
  for (std::uint64_t done = 0; done < sizeof(T);) {
    const std::uint64_t place = (offset + done) % BlockCache::kBytes;
    const std::uint64_t count = std::min(sizeof(T) - done, BlockCache::kBytes - place);
    std::memcpy(out + done, BlockCache::of_thread().find(file, (offset + done) / BlockCache::kBytes) + place, count);
    done += count;
  }
  return value;
}

// Numbers of a file one after the other, from byte `offset` on; the last ends before byte `end`.
template <typename T>
class InOrder {
 public:
  InOrder(const File& file, std::uint64_t offset, std::uint64_t end) : file_(file), offset_(offset), end_(end) {}

  T next() {
    if (place_ == loaded_) {
      loaded_ = std::min<std::uint64_t>(kNumbers, (end_ - offset_) / sizeof(T));
      if (loaded_ == 0) throw std::logic_error("a number past the end");
      file_.read(offset_, loaded_ * sizeof(T), numbers_);
      offset_ += loaded_ * sizeof(T);
      place_ = 0;
    }
    return numbers_[place_++];
  }

 private:
  static constexpr std::uint64_t kNumbers = 1024;

  const File& file_;
  std::uint64_t offset_;
  std::uint64_t end_;
  std::uint64_t place_ = 0;
  std::uint64_t loaded_ = 0;
  T numbers_[kNumbers];
};

}  // namespace megatron_lpr
