// An engine with several ranks, the workers being threads of this process.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "ranks/leader.h"
#include "ranks/worker.h"
#include "tests/engine/fixtures.h"
#include "tests/parallel/mailboxes.h"

namespace duplex::ranks_tests {

class RankedEngine {
 public:
  RankedEngine(const ModelConfig& config, std::int32_t n_ranks, Reduction reduction)
      : RankedEngine(config, n_ranks, reduction, engine_tests::small_options()) {}

  // `is_apart`: the ranks share no memory.
  RankedEngine(const ModelConfig& config, std::int32_t n_ranks, Reduction reduction,
               EngineOptions options, bool is_apart = false)
      : boxes_(is_apart ? std::make_shared<Mailboxes>() : nullptr) {
    model_tests::RandomCheckpoint checkpoint(config, 1);
    options.n_ranks = n_ranks;
    options.reduction = reduction;
    if (n_ranks > 1) start_workers(config, checkpoint, options);
    engine_ = std::make_shared<Engine>(config, model_tests::views(checkpoint.tensors()), options,
                                       LoadProgress{}, nullptr, leader_);
  }
  ~RankedEngine() {
    engine_->close();
    if (leader_ != nullptr) leader_->stop();
    for (std::thread& worker : workers_) worker.join();
  }

  Engine& operator*() const { return *engine_; }
  Engine* operator->() const { return engine_.get(); }
  RankLeader& leader() const { return *leader_; }
  // What the workers ended with; once this object is gone there is no more to come.
  const std::vector<std::string>& ends() const { return ends_; }

 private:
  void start_workers(const ModelConfig& config, model_tests::RandomCheckpoint& checkpoint,
                     const EngineOptions& options) {
    leader_ = std::make_shared<RankLeader>(config, options, transport(0, options.n_ranks));
    ends_.resize(static_cast<std::size_t>(options.n_ranks));
    for (std::int32_t rank = 1; rank < options.n_ranks; ++rank) {
      loaded_.push_back(
          std::make_unique<RankWorker>(config, model_tests::views(checkpoint.tensors()), options,
                                       group(config, options, rank), LoadProgress{}));
      workers_.emplace_back(
          [&worker = *loaded_.back(), &end = ends_[static_cast<std::size_t>(rank)]] {
            try {
              worker.serve();
            } catch (const RankFailed& error) {
              end = error.what();
            }
          });
    }
  }

  std::shared_ptr<Transport> transport(std::int32_t rank, std::int32_t n_ranks) const {
    return boxes_ == nullptr ? nullptr : std::make_shared<MailTransport>(boxes_, rank, n_ranks);
  }
  Group group(const ModelConfig& config, const EngineOptions& options, std::int32_t rank) const {
    return boxes_ == nullptr ? leader_->group().as(rank)
                             : Group::apart(group_options(config, options), rank,
                                            transport(rank, options.n_ranks));
  }

  std::shared_ptr<Mailboxes> boxes_;
  std::shared_ptr<RankLeader> leader_;
  std::vector<std::unique_ptr<RankWorker>> loaded_;
  std::vector<std::thread> workers_;
  std::vector<std::string> ends_;
  std::shared_ptr<Engine> engine_;
};

}  // namespace duplex::ranks_tests
