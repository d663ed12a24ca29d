// Threads of our own that share the parts of a loop.
//
// A part belongs to whoever takes it first, and the one that asked takes parts as well: a thread that the scheduler has
// put aside holds nobody up unless it was stopped within a part. Threads that have nothing to do stay awake for the gap
// between two loops of a token, then sleep: awake for longer, they would keep other programs, and torch's own threads,
// from the processors that they wait for.
//
// Which thread takes a part is open, so nothing that is computed may depend on it.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

constexpr int64_t MOST_THREADS = 1024;

// How many threads a loop of this thread may use. Within a loop it is one: loops in it are not shared.
thread_local int64_t threads_allowed = 1;

// Sets that number for as long as it lives.
class Allowed {
 public:
  explicit Allowed(int64_t threads) : before(threads_allowed) {
    threads_allowed = std::clamp<int64_t>(threads, 1, MOST_THREADS);
  }
  ~Allowed() { threads_allowed = before; }
  Allowed(const Allowed&) = delete;
  Allowed& operator=(const Allowed&) = delete;

 private:
  int64_t before;
};

// How long a thread stays awake that waits: CONMOE_OPERATOR_AWAKE, in microseconds, or as long as
// benchmarks/busy_machine.py found best.
const std::chrono::microseconds AWAKE([] {
  const char* const said = std::getenv("CONMOE_OPERATOR_AWAKE");
  return said ? std::clamp(std::atol(said), 0L, 1000000L) : 50L;
}());

// Waits for `ready` awake, for a bounded time; whether it came.
template <class Ready>
bool awake_until(Ready ready) {
  using Clock = std::chrono::steady_clock;
  constexpr int TURNS = 32;  // between two looks at the clock
  if (ready()) return true;
  const Clock::time_point end = Clock::now() + AWAKE;
  do {
    for (int turn = 0; turn < TURNS; ++turn) {
      if (ready()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("isb");  // `yield` does nothing on most of them
#endif
    }
  } while (Clock::now() < end);
  return false;
}

class Pool {
 public:
  using Work = void (*)(const void* what, int64_t part, int64_t thread);

  // That of this process: none outlives a fork, of which the child has none of the threads.
  static Pool& own() {
    Pool* found = instance.load(std::memory_order_acquire);
    if (found) return *found;
    auto made = std::make_unique<Pool>();
    if (instance.compare_exchange_strong(found, made.get())) found = made.release();  // it stays until the process ends
    return *found;
  }
  static void forget() { instance.store(nullptr); }

  // `work` for every part, by up to so many threads, of which the one that calls is number 0. False where the others work
  // for somebody else; then nothing has been done. May throw what the work threw, as std::bad_alloc.
  bool share(int64_t threads, uint32_t parts, Work work, const void* what) {
    const std::unique_lock<std::mutex> mine(turn, std::try_to_lock);
    if (!mine) return false;
    threads = std::min(threads, int64_t(parts));
    hire(threads - 1);
    // Nobody looks at these now who would do something then: none of the parts before is left.
    now.limit.store(threads, std::memory_order_relaxed);
    now.parts.store(parts, std::memory_order_relaxed);
    now.work.store(work, std::memory_order_relaxed);
    now.what.store(what, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    failed.store(false, std::memory_order_relaxed);
    const uint64_t number = (left.load(std::memory_order_relaxed) >> 32) + 1;
    left.store(number << 32 | parts);
    for (int64_t i = 0; i < std::min(threads - 1, int64_t(seats.size())); ++i) seats[size_t(i)]->wake();
    {
      const Allowed alone(1);
      take(0);
    }
    const auto all_done = [&] { return done.load() == parts; };
    if (!awake_until(all_done)) {
      std::unique_lock<std::mutex> lock(door);
      waits.store(true);
      last.wait(lock, all_done);
      waits.store(false);
    }
    if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
    return true;
  }

 private:
  static constexpr size_t LINE = 64;

  // Where a thread sleeps.
  struct alignas(LINE) Seat {
    std::mutex door;
    std::condition_variable bell;
    std::atomic<bool> asleep{false};

    void wake() {
      if (!asleep.load()) return;
      const std::lock_guard<std::mutex> lock(door);
      asleep.store(false);
      bell.notify_one();
    }
    // Unless `ready`: one of the two who look last, here and in `wake`, sees what the other has written.
    template <class Ready>
    void sleep(Ready ready) {
      std::unique_lock<std::mutex> lock(door);
      asleep.store(true);
      if (ready()) return asleep.store(false);
      bell.wait(lock, [&] { return !asleep.load(); });
    }
  };

  // More threads, as far as the system gives them.
  void hire(int64_t wanted) {
    while (int64_t(seats.size()) < wanted && !refused) {
      seats.push_back(std::make_unique<Seat>());
      try {
        std::thread([this, seat = seats.back().get(), thread = int64_t(seats.size())] { serve(*seat, thread); }).detach();
      } catch (const std::system_error&) {
        seats.pop_back();
        refused = true;
      }
    }
  }

  void serve(Seat& seat, int64_t thread) {
    const auto asked = [&] { return uint32_t(left.load()) && thread < now.limit.load(std::memory_order_relaxed); };
    for (;;) {
      if (!awake_until(asked)) seat.sleep(asked);
      take(thread);
    }
  }

  // Works off parts until none is left for this thread.
  void take(int64_t thread) {
    uint32_t mine = 0, parts = 0;
    for (uint64_t seen = left.load(); uint32_t(seen) && thread < now.limit.load(std::memory_order_relaxed);) {
      // These belong together, and to `seen`, if it is still there below: while a part is left, nobody changes them.
      parts = now.parts.load(std::memory_order_relaxed);
      const Work work = now.work.load(std::memory_order_relaxed);
      const void* const what = now.what.load(std::memory_order_relaxed);
      if (!left.compare_exchange_weak(seen, seen - 1)) continue;
      try {
        work(what, int64_t(parts - uint32_t(seen)), thread);
      } catch (...) {  // of our own code only std::bad_alloc
        failed.store(true, std::memory_order_relaxed);
      }
      ++mine;
      seen = left.load();
    }
    if (!mine || done.fetch_add(mine) + mine != parts || !waits.load()) return;
    const std::lock_guard<std::mutex> lock(door);
    last.notify_one();
  }

  static std::atomic<Pool*> instance;

  std::mutex turn;                           // whoever has it may change what follows
  std::vector<std::unique_ptr<Seat>> seats;  // of the threads 1, 2, ...
  bool refused = false;
  struct {
    std::atomic<int64_t> limit{0};  // threads from this number on take no part
    std::atomic<uint32_t> parts{0};
    std::atomic<Work> work{nullptr};
    std::atomic<const void*> what{nullptr};
  } now;
  alignas(LINE) std::atomic<uint64_t> left{0};  // a number for each loop, and how many of its parts nobody has taken
  alignas(LINE) std::atomic<uint32_t> done{0};
  std::atomic<bool> failed{false}, waits{false};
  std::mutex door;
  std::condition_variable last;
};

std::atomic<Pool*> Pool::instance{nullptr};

#if !defined(_WIN32)
const int at_fork = pthread_atfork(nullptr, nullptr, Pool::forget);
#endif

// So many of `count` at once that every thread gets some, a slow one fewer; all of them where that is not `worth` it.
inline int64_t evenly(int64_t count, bool worth) {
  return worth ? std::max<int64_t>(1, count / (4 * threads_allowed)) : count;
}

// Calls `run(i, thread)` for every i below `count`, by the threads that are allowed; each takes `at_once` neighbours at a
// time. Threads have numbers from 0 below `threads_allowed`. Throws std::bad_alloc where `run` throws; nothing runs then.
template <class Run>
void shared_loop(int64_t count, int64_t at_once, const Run& run) {
  at_once = std::max(at_once, (count >> 31) + 1);
  const int64_t parts = (count + at_once - 1) / at_once;
  if (parts > 1 && threads_allowed > 1) {
    struct What {
      const Run& run;
      int64_t count, at_once;
    } const what{run, count, at_once};
    const auto work = [](const void* from, int64_t part, int64_t thread) {
      const auto& [run, count, at_once] = *static_cast<const What*>(from);
      const int64_t stop = std::min(count, (part + 1) * at_once);
      for (int64_t i = part * at_once; i < stop; ++i) run(i, thread);
    };
    if (Pool::own().share(threads_allowed, uint32_t(parts), work, &what)) return;
  }
  for (int64_t i = 0; i < count; ++i) run(i, 0);
}

}  // namespace
