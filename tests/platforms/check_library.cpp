// check_library LIBRARY CASES LEVEL: the library is of that level, and computes what product_cases.py has written down.
//
// Prints a line for each case: its function, the kind of its numbers and a digest of the bits that came out; then what is
// wrong. The exit status is whether anything is.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
static void* opened(const char* path) { return reinterpret_cast<void*>(LoadLibraryA(path)); }
static void* found(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}
static const char* problem() {
  static char text[40];
  std::snprintf(text, sizeof(text), "error %lu", GetLastError());
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
  double near;
};

// As torch's tensors: at a multiple of 64.
struct Place {
  explicit Place(int64_t bytes) : at(static_cast<char*>(::operator new(size_t(bytes) + 64, std::align_val_t(64)))) {}
  ~Place() { ::operator delete(at, std::align_val_t(64)); }
  Place(const Place&) = delete;
  char* at;
};

bool read(std::FILE* file, void* place, int64_t bytes) {
  return std::fread(place, 1, size_t(bytes), file) == size_t(bytes);
}

[[noreturn]] void stop(const char* what, const char* why) {
  std::printf("%s: %s\n", what, why);
  std::exit(2);
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
  if (std::strcmp(level, given[3])) stop("its level", level);
  const int64_t threads = 2;
  std::FILE* const file = std::fopen(given[2], "rb");
  if (!file) stop(given[2], "cannot be opened");
  int cases = 0, wrong = 0;
  Case up{};
  std::vector<char> up_values, up_scales;
  for (Case one; read(file, &one, sizeof(one)); ++cases) {
    Place values(one.bytes[0]), scales(one.bytes[1]), x(one.bytes[2]);
    int64_t numbers = 0;
    bool whole = read(file, values.at, one.bytes[0]) && read(file, scales.at, one.bytes[1]) &&
                 read(file, x.at, one.bytes[2]) && read(file, &numbers, sizeof(numbers));
    std::vector<double> wanted(static_cast<size_t>(numbers));
    if (!whole || !read(file, wanted.data(), numbers * int64_t(sizeof(double)))) stop(given[2], "ends early");
    if (one.function == GATED) {  // the rest of it comes with the next
      up = one;
      up_values.assign(values.at, values.at + one.bytes[0]);
      up_scales.assign(scales.at, scales.at + one.bytes[1]);
      continue;
    }
    const Place out(numbers * int64_t(sizeof(float)));
    float* const y = reinterpret_cast<float*>(out.at);
    const void* const both[] = {values.at, one.bytes[1] ? scales.at : nullptr};
    const int kind = int(one.kind);
    int code = 0;
    if (one.function == FEW_ROWS)
      code = few_rows(threads, kind, 1, &both[0], &both[1], x.at, 0, one.tokens, y, one.rows, one.columns, one.group, 0);
    else if (one.function == MANY_ROWS)
      code = many_rows(threads, kind, both[0], both[1], x.at, one.tokens, y, one.rows, one.columns, one.group, 0);
    else if (one.function == EXPAND)
      code = expand(threads, kind, both[0], both[1], y, 0, one.rows, one.columns, one.group);
    else {
      const Place first(int64_t(up_values.size())), steps(int64_t(up_scales.size()));
      std::memcpy(first.at, up_values.data(), up_values.size());
      std::memcpy(steps.at, up_scales.data(), up_scales.size());
      const void* const ups[] = {first.at, steps.at};
      const Gate silu{0, 0, 0};
      code = gated_experts(threads, int(up.kind), kind, 1, &ups[0], &ups[1], &both[0], &both[1], x.at, y, &one.columns,
                           up.columns, up.group, &one.group, 0, nullptr, nullptr, &silu);
    }
    double most = 1e-6, far = 0;
    bool numeric = true;
    uint64_t digest = 14695981039346656037u;
    for (int64_t i = 0; i < numbers; ++i) {
      most = std::fmax(most, std::fabs(wanted[size_t(i)]));
      const double apart = std::fabs(double(y[i]) - wanted[size_t(i)]);
      far = std::fmax(far, apart);
      numeric &= apart == apart;
      uint32_t bits;
      std::memcpy(&bits, y + i, sizeof(bits));
      digest = (digest ^ bits) * 1099511628211u;
    }
    std::printf("%s %d %016llx\n", NAMES[one.function], kind, static_cast<unsigned long long>(digest));
    if (code || !numeric || far > one.near * most) {
      ++wrong;
      std::printf("WRONG: code %d, off by %g of %g\n", code, far, most);
    }
  }
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return cases == 0 || wrong;
}
