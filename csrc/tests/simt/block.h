// A thread block that runs beside others, a piece at a time: for streams.h.
#pragma once

#include <memory>

#include "tests/simt/grid.h"

namespace duplex::simt {

class Machine;

class Block {
 public:
  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // What run_grid() takes, of which this is one block, and the seed of its order of threads. The
  // block before has ended.
  void begin(const LaunchShape& shape, std::int64_t index, void (*call)(const void*),
             const void* context, std::uint32_t seed);
  // The same in the order of set_order(), until every thread has returned or waits for the grid
  // before; then end() goes on to the end.
  void begin_early(const LaunchShape& shape, std::int64_t index, void (*call)(const void*),
                   const void* context, std::uint32_t seed);
  void end();
  // Every thread that can, or only some of them, goes on to its next wait. False once all have
  // returned. Throws what run_grid() throws; the block is then good for nothing.
  bool pass(bool skip);

 private:
  std::unique_ptr<Machine> machine_;
};

// Who runs the launches of this system thread, from now on; null: run_grid() itself.
class Runner {
 public:
  virtual ~Runner() = default;
  virtual void run(const LaunchShape& shape, void (*call)(const void*), const void* context) = 0;
};
void set_runner(Runner* runner);
bool has_runner();

// The thread that runs now: its block, its number there, and the barriers that it has passed.
struct Origin {
  const void* block;
  int thread;
  int n_barriers;
};
Origin origin();

}  // namespace duplex::simt
