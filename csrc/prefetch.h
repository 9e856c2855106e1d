// Reads batches ahead of their reader with its own threads: the same batches in the same order as Sampler::fill.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "sampler.h"

namespace megatron_lpr {

// Buffers [count, seq_length] of one batch, uninitialised; `documents` is empty where the sampler numbers none.
struct BatchBuffers {
  BatchBuffers(const Sampler& sampler, std::uint64_t count)
      : size(count * sampler.seq_length()),
        tokens(new std::int64_t[size]),
        labels(new std::int64_t[size]),
        loss_mask(new float[size]),
        tags(new std::int64_t[size]),
        documents(sampler.document_ids() ? new std::int32_t[size] : nullptr) {}

  Row row() { return {tokens.get(), labels.get(), loss_mask.get(), tags.get(), documents.get()}; }

  std::uint64_t size;
  std::unique_ptr<std::int64_t[]> tokens;
  std::unique_ptr<std::int64_t[]> labels;
  std::unique_ptr<float[]> loss_mask;
  std::unique_ptr<std::int64_t[]> tags;
  std::unique_ptr<std::int32_t[]> documents;
};

// Buffers that come back when their last reader lets go of them, so that batch after batch is written to memory that
// the process has already.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  explicit BufferPool(std::size_t kept) : kept_(kept) {}

  std::shared_ptr<BatchBuffers> lend(const Sampler& sampler, std::uint64_t count) {
    std::unique_ptr<BatchBuffers> buffers;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        buffers = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (!buffers) buffers = std::make_unique<BatchBuffers>(sampler, count);
    return {buffers.release(), [pool = shared_from_this()](BatchBuffers* returned) { pool->take_back(returned); }};
  }

 private:
  void take_back(BatchBuffers* returned) {
    std::unique_ptr<BatchBuffers> buffers(returned);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.size() < kept_) free_.push_back(std::move(buffers));
  }

  std::size_t kept_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<BatchBuffers>> free_;
};

class Prefetcher {
 public:
  // Batch i holds samples first + i * stride, ..., + count - 1; at most `depth` batches wait for their reader.
  Prefetcher(std::shared_ptr<const Sampler> sampler, std::uint64_t first, std::uint64_t count, std::uint64_t stride,
             std::size_t depth, std::size_t threads)
      : sampler_(std::move(sampler)),
        first_(first),
        count_(count),
        stride_(stride),
        pool_(std::make_shared<BufferPool>(depth + threads + 1)),
        slots_(depth) {
    if (count == 0 || depth == 0 || threads == 0) throw std::invalid_argument("a prefetcher needs work and threads");
    for (std::size_t i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;
  ~Prefetcher() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    emptied_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // The next batch; raises what went wrong while it was read, again at every later call.
  std::shared_ptr<BatchBuffers> next() {
    std::unique_lock<std::mutex> lock(mutex_);
    Slot& slot = slots_[read_ % slots_.size()];
    filled_.wait(lock, [&] { return slot.batch || slot.error; });
    if (slot.error) std::rethrow_exception(slot.error);
    std::shared_ptr<BatchBuffers> batch = std::move(slot.batch);
    ++read_;
    lock.unlock();
    emptied_.notify_one();
    return batch;
  }

 private:
  struct Slot {
    std::shared_ptr<BatchBuffers> batch;
    std::exception_ptr error;
  };

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      emptied_.wait(lock, [&] { return closed_ || claimed_ < read_ + slots_.size(); });
      if (closed_) return;
      const std::uint64_t number = claimed_++;
      lock.unlock();
      Slot result;
      try {
        result.batch = pool_->lend(*sampler_, count_);
        sampler_->fill(first_ + number * stride_, count_, result.batch->row());
      } catch (...) {
        result.batch.reset();
        result.error = std::current_exception();
      }
      lock.lock();
      slots_[number % slots_.size()] = std::move(result);
      filled_.notify_all();
    }
  }

  std::shared_ptr<const Sampler> sampler_;
  std::uint64_t first_;
  std::uint64_t count_;
  std::uint64_t stride_;
  std::shared_ptr<BufferPool> pool_;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::condition_variable emptied_;
  std::vector<Slot> slots_;
  std::uint64_t claimed_ = 0;
  std::uint64_t read_ = 0;
  bool closed_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace megatron_lpr
