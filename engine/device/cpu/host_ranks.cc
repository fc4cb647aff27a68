#include "engine/device/cpu/host_ranks.h"

#include <algorithm>

namespace tandem::engine {

class HostRanks::End final : public Collective {
 public:
  End(HostRanks* ranks, int rank) : ranks_(ranks), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_->values_.size()); }

  float* BeginSum(float* values, size_t count, Stream* /*stream*/) override {
    if (rank_ > 0) std::fill_n(values, count, 0.0f);
    return values;
  }

  // Each rank adds up a part of the values and gives it to all.
  void EndSum(float* values, size_t count, Stream* /*stream*/) override {
    std::vector<float*>& all = ranks_->values_;
    const auto rank = static_cast<size_t>(rank_);
    all[rank] = values;
    ranks_->all_.arrive_and_wait();
    const size_t begin = count * rank / all.size(), end = count * (rank + 1) / all.size();
    for (size_t i = begin; i < end; ++i) {
      float sum = all[0][i];
      for (size_t k = 1; k < all.size(); ++k) sum += all[k][i];
      for (float* of_rank : all) of_rank[i] = sum;
    }
    ranks_->all_.arrive_and_wait();
  }

 private:
  HostRanks* const ranks_;
  const int rank_;
};

HostRanks::HostRanks(int size) : all_(size), values_(static_cast<size_t>(size)) {
  for (int rank = 0; rank < size; ++rank) ends_.push_back(std::make_unique<End>(this, rank));
}

HostRanks::~HostRanks() = default;

Collective* HostRanks::at(int rank) const { return ends_[static_cast<size_t>(rank)].get(); }

}  // namespace tandem::engine
