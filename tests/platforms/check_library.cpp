// check_library LIBRARY CASES LEVEL: the library is of that level, and computes what product_cases.py has written down.
//
// Prints a line for each case: its function, the kind of its numbers and a digest of the bits that came out; then what is
// wrong. The exit status is whether anything is. It needs no C++ library, so that it is compiled in a second.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <windows.h>
static void* opened(const char* path) { return reinterpret_cast<void*>(LoadLibraryA(path)); }
static void* found(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}
static const char* problem() {
  static char text[40];
  snprintf(text, sizeof(text), "error %lu", GetLastError());
  return text;
}
#else
#include <dlfcn.h>
static void* opened(const char* path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }
static void* found(void* library, const char* name) { return dlsym(library, name); }
static const char* problem() { return dlerror(); }
#endif

namespace {

enum { FEW_ROWS, MANY_ROWS, EXPAND, GATED, DOWN };
const char* const NAMES[] = {"few_rows", "many_rows", "expand", "", "gated_experts"};

struct Gate {
  float alpha, limit;
  int32_t interleaved;
};

using FewRows = int (*)(int64_t, int, int64_t, const void* const*, const void* const*, const void*, int64_t, int64_t, void*,
                        int64_t, int64_t, int64_t, int);
using ManyRows = int (*)(int64_t, int, const void*, const void*, const void*, int64_t, void*, int64_t, int64_t, int64_t,
                         int);
using Expand = int (*)(int64_t, int, const void*, const void*, void*, int, int64_t, int64_t, int64_t);
using GatedExperts = int (*)(int64_t, int, int, int64_t, const void* const*, const void* const*, const void* const*,
                             const void* const*, const void*, float*, const int64_t*, int64_t, int64_t, const int64_t*, int,
                             const uint16_t* const*, const uint16_t* const*, const Gate*);

struct Case {
  int64_t function, kind, rows, columns, group, tokens, bytes[3];
  double allowed;
};

// As torch's tensors: at a multiple of 64. What is taken for a case is not given back.
char* place(int64_t bytes) {
  char* const at = static_cast<char*>(malloc(size_t(bytes) + 128));
  return at + (64 - reinterpret_cast<uintptr_t>(at) % 64);
}

bool read(FILE* file, void* place, int64_t bytes) {
  return fread(place, 1, size_t(bytes), file) == size_t(bytes);
}

[[noreturn]] void stop(const char* what, const char* why) {
  printf("%s: %s\n", what, why);
  exit(2);
}

}  // namespace

int main(int count, char** given) {
  if (count != 4) stop("use", "check_library LIBRARY CASES LEVEL");
  void* const library = opened(given[1]);
  if (!library) stop(given[1], problem());
  const auto function = [&](const char* name) {
    void* const place = found(library, name);
    if (!place) stop(name, problem());
    return place;
  };
  const auto few_rows = reinterpret_cast<FewRows>(function("conmoe_few_rows"));
  const auto many_rows = reinterpret_cast<ManyRows>(function("conmoe_many_rows"));
  const auto expand = reinterpret_cast<Expand>(function("conmoe_expand"));
  const auto gated_experts = reinterpret_cast<GatedExperts>(function("conmoe_gated_experts"));
  const char* const level = reinterpret_cast<const char* (*)()>(function("conmoe_level"))();
  if (strcmp(level, given[3])) stop("its level", level);
  const int64_t threads = 2;
  FILE* const file = fopen(given[2], "rb");
  if (!file) stop(given[2], "cannot be opened");
  int cases = 0, wrong = 0;
  Case up{};
  const void* ups[] = {nullptr, nullptr};
  for (Case one; read(file, &one, sizeof(one)); ++cases) {
    char* const arrays[] = {place(one.bytes[0]), place(one.bytes[1]), place(one.bytes[2])};
    int64_t numbers = 0;
    bool whole = true;
    for (int i = 0; i < 3; ++i) whole = whole && read(file, arrays[i], one.bytes[i]);
    whole = whole && read(file, &numbers, sizeof(numbers));
    double* const wanted = reinterpret_cast<double*>(place(numbers * int64_t(sizeof(double))));
    if (!whole || !read(file, wanted, numbers * int64_t(sizeof(double)))) stop(given[2], "ends early");
    const void* const both[] = {arrays[0], one.bytes[1] ? arrays[1] : nullptr};
    if (one.function == GATED) {  // the rest of it comes with the next
      up = one;
      ups[0] = both[0];
      ups[1] = both[1];
      continue;
    }
    const void* const x = arrays[2];
    float* const y = reinterpret_cast<float*>(place(numbers * int64_t(sizeof(float))));
    const int kind = int(one.kind);
    int code = 0;
    if (one.function == FEW_ROWS)
      code = few_rows(threads, kind, 1, &both[0], &both[1], x, 0, one.tokens, y, one.rows, one.columns, one.group, 0);
    else if (one.function == MANY_ROWS)
      code = many_rows(threads, kind, both[0], both[1], x, one.tokens, y, one.rows, one.columns, one.group, 0);
    else if (one.function == EXPAND)
      code = expand(threads, kind, both[0], both[1], y, 0, one.rows, one.columns, one.group);
    else {
      const Gate silu{0, 0, 0};
      code = gated_experts(threads, int(up.kind), kind, 1, &ups[0], &ups[1], &both[0], &both[1], x, y, &one.columns,
                           up.columns, up.group, &one.group, 0, nullptr, nullptr, &silu);
    }
    double most = 1e-6, most_apart = 0;
    bool numeric = true;
    uint64_t digest = 14695981039346656037u;
    for (int64_t i = 0; i < numbers; ++i) {
      most = fmax(most, fabs(wanted[i]));
      const double apart = fabs(double(y[i]) - wanted[i]);
      most_apart = fmax(most_apart, apart);
      numeric &= apart == apart;
      uint32_t bits;
      memcpy(&bits, y + i, sizeof(bits));
      digest = (digest ^ bits) * 1099511628211u;
    }
    printf("%s %d %016llx\n", NAMES[one.function], kind, static_cast<unsigned long long>(digest));
    if (code || !numeric || most_apart > one.allowed * most) {
      ++wrong;
      printf("WRONG: code %d, off by %g of %g\n", code, most_apart, most);
    }
  }
  printf("%d cases, %d wrong\n", cases, wrong);
  return cases == 0 || wrong;
}
