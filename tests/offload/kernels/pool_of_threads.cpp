// The pool of csrc/pool.h: every part once, by threads with numbers of their own, also within loops, from several threads
// at a time, after a failure, with more threads or fewer, and in a child of a fork. Prints what is wrong; the exit status
// is whether anything is.

#include <cstdio>
#include <cstdlib>

#include "pool.h"

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

std::atomic<int> wrong{0};

void expect(bool right, const char* what) {
  if (!right && ++wrong < 20) std::fprintf(stderr, "%s\n", what);
}

// A loop that notes who did what; each thread has a place of its own, as rooms of threads are.
void loop(int64_t threads, int64_t count, int64_t at_once) {
  const Allowed allowed(threads);
  std::vector<std::atomic<int>> times(static_cast<size_t>(count));
  std::vector<int64_t> own(static_cast<size_t>(threads), 0);
  shared_loop(count, at_once, [&](int64_t i, int64_t thread) {
    expect(thread >= 0 && thread < threads, "a number of a thread");
    ++times[size_t(i)];
    own[size_t(thread)] += i;
  });
  int64_t total = 0;
  for (const int64_t one : own) total += one;
  for (const auto& one : times) expect(one == 1, "every part once");
  expect(total == count * (count - 1) / 2, "what the threads have done together");
  expect(threads_allowed == threads, "as many threads afterwards");
}

void loops(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) loop(1 + round % 5, 1 + round * 7 % 61, 1 + round % 3);
}

void within() {
  const Allowed allowed(3);
  std::atomic<int64_t> total{0};
  shared_loop(8, 1, [&](int64_t, int64_t) {
    expect(threads_allowed == 1, "a loop within a loop is for one thread");
    std::vector<int64_t> own(1, 0);
    shared_loop(100, 1, [&](int64_t i, int64_t thread) {
      expect(thread == 0, "and its number is 0");
      own[0] += i;
    });
    total += own[0];
  });
  expect(total == 8 * 4950, "loops within a loop");
}

void failing(int64_t threads) {
  const Allowed allowed(threads);
  for (int64_t bad = 0; bad < 7; ++bad) {
    bool thrown = false;
    try {
      shared_loop(7, 1, [&](int64_t i, int64_t) {
        if (i == bad) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    expect(thrown, "a failure reaches the one who asked");
    loop(threads, 50, 1);
  }
}

void sleeping() {
  for (int round = 0; round < 20; ++round) {
    loop(3, 40, 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until all of them sleep
  }
  // And the one who asked, while another still works.
  const Allowed allowed(2);
  for (int round = 0; round < 5; ++round)
    shared_loop(2, 1, [&](int64_t, int64_t thread) {
      std::this_thread::sleep_for(std::chrono::milliseconds(thread == 0 ? 1 : 4));
    });
}

void several() {
  std::vector<std::thread> askers;
  for (int i = 0; i < 4; ++i) askers.emplace_back([] { loops(300); });
  for (std::thread& one : askers) one.join();
}

#if !defined(_WIN32)
// While another thread uses the pool of the parent.
void forks() {
  std::atomic<bool> enough{false};
  std::thread busy([&] {
    while (!enough) loop(3, 200, 1);
  });
  for (int round = 0; round < 10; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      loops(20);
      _exit(wrong != 0);
    }
    int status = 0;
    expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child of a fork");
  }
  enough = true;
  busy.join();
  loops(20);
}
#endif

}  // namespace

int main(int count, char** arguments) {
  const int64_t rounds = count > 1 ? std::atoll(arguments[1]) : 2000;
  loops(rounds);
  within();
  failing(1);
  failing(3);
  sleeping();
  several();
#if !defined(_WIN32)
  if (count < 3) forks();  // a second argument leaves it out: the thread sanitizer does not follow a fork
#endif
  return wrong != 0;  // with threads that are awake, or asleep
}
