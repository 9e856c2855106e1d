// Which of the first k samples are of expanded languages? R(k) = round(k * w), in closed form.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace megatron_lpr {

using Wide = unsigned __int128;

// Of the first k samples R(k) are expanded and k - R(k) original, so both are within 1/2 of their share.
// The share is numerator / denominator, the denominator at most 2^62; k stays below 2^62.
class RoleSplit {
 public:
  RoleSplit(std::uint64_t numerator, std::uint64_t denominator) : numerator_(numerator), denominator_(denominator) {
    if (denominator == 0 || denominator > (1ULL << 62) || numerator > denominator)
      throw std::invalid_argument("a role's share must be a fraction in [0, 1] with a denominator of at most 2^62");
  }

  bool uses_expanded() const { return numerator_ > 0; }
  bool uses_original() const { return numerator_ < denominator_; }

  std::uint64_t expanded_before(std::uint64_t k) const {
    return static_cast<std::uint64_t>(position(k) / (2 * static_cast<Wide>(denominator_)));
  }

  // The roles of samples k, k + 1, ...: one division at the start, an addition per sample.
  class Walk {
   public:
    Walk(const RoleSplit& split, std::uint64_t k) : step_(2 * split.numerator_), unit_(2 * split.denominator_) {
      remainder_ = static_cast<std::uint64_t>(split.position(k) % unit_);
    }

    bool next_is_expanded() {
      remainder_ += step_;
      const bool expanded = remainder_ >= unit_;
      if (expanded) remainder_ -= unit_;
      return expanded;
    }

   private:
    std::uint64_t step_;
    std::uint64_t unit_;
    std::uint64_t remainder_;
  };

 private:
  Wide position(std::uint64_t k) const { return 2 * static_cast<Wide>(k) * numerator_ + denominator_; }

  std::uint64_t numerator_;
  std::uint64_t denominator_;
};

}  // namespace megatron_lpr
