// Sample k of a mixture -> corpus, and how many samples that corpus gave before: a binary tree of splits (split.h), in
// closed form at any k, without a table.
//
// The top split is that of the roles, expanded and original. Below it the corpora of each role, with their integer
// weights, are the leaves of a Huffman tree: the two lightest nodes are joined until one is left.
//
// How far a count can be from its share. A node that has e samples too many or too few passes p e of them on to a child
// of share p, and rounding adds at most 1/2. So for a corpus of weight w, below nodes of the weights W_1 (its parent),
// W_2, ..., W_d (its whole role, which the top split leaves within 1/2), after any k samples
//
//   |count - k share| <= (1 + w / W_1 + w / W_2 + ... + w / W_d) / 2.
//
// When a node was made, its two children were the lightest there were, so that its sibling, there already or made later
// of nodes that were there, is at least as heavy as either. Hence W_1 >= w, W_2 >= W_1 + w, W_3 >= W_2 + W_1, ...: the
// weights grow like the Fibonacci numbers 1, 1, 2, 3, 5, ... or faster, and the sum of those numbers' reciprocals is
// below 3.36. Whatever the weights, a corpus is less than 1.68 samples from its share. A sum of weights of 2^60 leaves
// room for fewer than 88 splits above a corpus; on average they are fewest for the corpora that are read most.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <queue>
#include <stdexcept>
#include <utility>
#include <vector>

#include "split.h"

namespace megatron_lpr {

struct MixtureSpec {
  std::uint64_t first_sample;          // of the run
  Split expanded;                      // share of expanded samples
  std::vector<std::uint64_t> weights;  // share of each corpus within its role; 0 leaves it out
};

class Mixture {
 public:
  static constexpr std::uint64_t kMaxTotal = 1ULL << 60;  // of the weights of a role

  Mixture(const MixtureSpec& spec, const std::vector<bool>& is_expanded) {
    std::array<Heap, 2> roles;  // expanded, original
    for (std::uint32_t corpus = 0; corpus < spec.weights.size(); ++corpus) {
      const bool expanded = is_expanded[corpus];
      if (spec.weights[corpus] == 0 || !(expanded ? spec.expanded.uses_first() : spec.expanded.uses_second())) continue;
      roles[expanded ? 0 : 1].emplace(spec.weights[corpus], static_cast<std::uint32_t>(corpora_.size()));
      corpora_.push_back(corpus);
    }
    if ((spec.expanded.uses_first() && roles[0].empty()) || (spec.expanded.uses_second() && roles[1].empty()))
      throw std::invalid_argument("a role with a share of the mixture has no corpus");
    for (Heap& role : roles) join(role);
    if (!roles[0].empty() && !roles[1].empty())
      inner_.push_back({spec.expanded, {roles[0].top().second, roles[1].top().second}});
  }

  // Adds each corpus' samples among the mixture's first k.
  void add_counts(std::uint64_t k, std::vector<std::uint64_t>& counts) const {
    std::vector<std::uint64_t> given(corpora_.size() + inner_.size());
    given.back() = k;
    for (std::size_t number = inner_.size(); number-- > 0;) {  // parents come after their children
      const Inner& node = inner_[number];
      const std::uint64_t n = given[corpora_.size() + number], first = node.split.first_before(n);
      given[node.children[0]] = first;
      given[node.children[1]] = n - first;
    }
    for (std::size_t leaf = 0; leaf < corpora_.size(); ++leaf) counts[corpora_[leaf]] += given[leaf];
  }

  struct Draw {
    std::uint32_t corpus;
    std::uint64_t index;  // samples of the corpus before this one in the mixture
  };

  // Samples k, k + 1, ...: divisions where a node is met for the first time, additions from then on.
  class Walk {
   public:
    Walk(const Mixture& mixture, std::uint64_t k)
        : mixture_(mixture), states_(mixture.corpora_.size() + mixture.inner_.size(), State{kUnmet, 0}) {
      meet(static_cast<std::uint32_t>(states_.size() - 1), k);
    }

    Draw next() {
      const auto leaves = static_cast<std::uint32_t>(mixture_.corpora_.size());
      auto id = static_cast<std::uint32_t>(states_.size() - 1);
      std::uint64_t given = states_[id].given++;
      while (id >= leaves) {
        const Inner& node = mixture_.inner_[id - leaves];
        const bool first = node.split.next_is_first(states_[id].remainder);
        id = node.children[first ? 0 : 1];
        if (states_[id].given == kUnmet) {
          const std::uint64_t firsts = node.split.first_before(given);
          meet(id, first ? firsts : given - firsts);
        }
        given = states_[id].given++;
      }
      return {mixture_.corpora_[id], given};
    }

   private:
    static constexpr std::uint64_t kUnmet = ~0ULL;

    struct State {
      std::uint64_t given;      // samples before
      std::uint64_t remainder;  // of the split
    };

    void meet(std::uint32_t id, std::uint64_t given) {
      const std::size_t leaves = mixture_.corpora_.size();
      states_[id] = {given, id < leaves ? 0 : mixture_.inner_[id - leaves].split.remainder(given)};
    }

    const Mixture& mixture_;
    std::vector<State> states_;
  };

 private:
  struct Inner {
    Split split;
    std::array<std::uint32_t, 2> children;
  };

  using Weighted = std::pair<std::uint64_t, std::uint32_t>;  // weight, node
  using Heap = std::priority_queue<Weighted, std::vector<Weighted>, std::greater<Weighted>>;

  // Leaves the root of a Huffman tree; of two nodes of one weight the earlier is the lighter, the first child is the
  // lighter of the two.
  void join(Heap& nodes) {
    while (nodes.size() > 1) {
      const auto [weight, node] = nodes.top();
      nodes.pop();
      const auto [other_weight, other] = nodes.top();
      nodes.pop();
      const std::uint64_t sum = weight + other_weight;
      if (weight > kMaxTotal || other_weight > kMaxTotal || sum > kMaxTotal)
        throw std::invalid_argument("corpus weights must sum to at most 2^60");
      inner_.push_back({Split(weight, sum), {node, other}});
      nodes.emplace(sum, static_cast<std::uint32_t>(corpora_.size() + inner_.size() - 1));
    }
  }

  std::vector<std::uint32_t> corpora_;  // of the leaves, which are the nodes 0, 1, ...
  std::vector<Inner> inner_;            // the nodes behind them, the root last
};

}  // namespace megatron_lpr
