// Which of the first n of something go to the first of two sides? R(n) = round(n p), in closed form.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace megatron_lpr {

using Wide = unsigned __int128;

// The first side's share p is numerator / denominator, the denominator at most 2^62; n stays below 2^62. The second side
// has n - R(n), so that both are within 1/2 of their share.
class Split {
 public:
  Split(std::uint64_t numerator, std::uint64_t denominator) : step_(2 * numerator), unit_(2 * denominator) {
    if (denominator == 0 || denominator > (1ULL << 62) || numerator > denominator)
      throw std::invalid_argument("a share must be a fraction in [0, 1] with a denominator of at most 2^62");
  }

  bool uses_first() const { return step_ > 0; }
  bool uses_second() const { return step_ < unit_; }

  std::uint64_t first_before(std::uint64_t n) const { return static_cast<std::uint64_t>(position(n) / unit_); }

  // The step after n takes n's remainder to the next, by one addition, and says to which side it goes.
  std::uint64_t remainder(std::uint64_t n) const { return static_cast<std::uint64_t>(position(n) % unit_); }

  bool next_is_first(std::uint64_t& remainder) const {
    remainder += step_;
    const bool first = remainder >= unit_;
    remainder -= first ? unit_ : 0;
    return first;
  }

 private:
  Wide position(std::uint64_t n) const { return static_cast<Wide>(n) * step_ + unit_ / 2; }

  std::uint64_t step_;  // numerator and denominator, doubled: halves are integers
  std::uint64_t unit_;
};

}  // namespace megatron_lpr
