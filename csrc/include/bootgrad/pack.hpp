// Copies that give the micro-kernel its operands, and the work sharing between threads.

namespace bootgrad::BOOTGRAD_ISA {

// Tests leave a gap behind each piece of scratch memory and define forbid() to catch an access to it.
#ifndef BOOTGRAD_GAP
#define BOOTGRAD_GAP 0
inline void forbid(uintptr_t, size_t) {}
#endif

// Hands out pieces of one piece of memory. With base 0 it only counts, so that one function states sizes and places.
struct Carver {
  uintptr_t base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), taken = (bytes + 63) / 64 * 64 + BOOTGRAD_GAP;
    if (BOOTGRAD_GAP > 0 && base != 0) forbid(base + used + bytes, taken - bytes);
    used += taken;
    return p;
  }
};

template <class T>
BOOTGRAD_INLINE void clear(T* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

// The first and the last `part` of fewer than twice as many.
template <int64_t part, class T>
BOOTGRAD_INLINE void copy_twice(const T* in, T* out, int64_t count) {
  T first[part], last[part];
  __builtin_memcpy(first, in, sizeof first);
  __builtin_memcpy(last, in + count - part, sizeof last);
  __builtin_memcpy(out, first, sizeof first);
  __builtin_memcpy(out + count - part, last, sizeof last);
}

template <class In, class T>
BOOTGRAD_INLINE void copy_row(const In* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
}
// Rows are short: whole pieces and a last one that overlaps them are quicker than a call.
template <class T>
BOOTGRAD_INLINE void copy_row(const T* in, T* out, int64_t count) {
  constexpr int64_t n = kLanes<T>;
  if (count >= n) {
    for (int64_t i = 0; i + n < count; i += n) store<T>(out + i, load<T>(in + i));
    store<T>(out + count - n, load<T>(in + count - n));
  } else if (2 * count >= n) {
    copy_twice<n / 2>(in, out, count);
  } else if (4 * count >= n) {
    copy_twice<(n < 4 ? 1 : n / 4)>(in, out, count);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  }
}

template <class T, class Out>
BOOTGRAD_INLINE void narrow_row(const T* in, Out* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(in[i], out[i]);
}
template <class T>
BOOTGRAD_INLINE void narrow_row(const T* in, T* out, int64_t count) {
  copy_row(in, out, count);
}

// Copies planes of `size` into planes of `padded`, `low` elements in from the front; the margins are left alone.
template <class In, class T>
void pad(const In* in, int64_t planes, const int64_t size[3], T* out, const int64_t padded[3], const int64_t low[3]) {
  const int64_t plane = padded[0] * padded[1] * padded[2];
  for (int64_t c = 0; c < planes; ++c, out += plane)
    for (int64_t d = 0; d < size[0]; ++d)
      for (int64_t h = 0; h < size[1]; ++h, in += size[2])
        copy_row(in, out + ((d + low[0]) * padded[1] + h + low[1]) * padded[2] + low[2], size[2]);
}

// out[r·ld_out + c] = factor · in[r·ld_in + c]
template <class In, class Out, class T>
void copy_rows(const In* in, int64_t ld_in, int64_t rows, int64_t columns, Out* out, int64_t ld_out, T factor) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, in += ld_in, out += ld_out) {
    int64_t c = 0;
    for (; c + n <= columns; c += n) store_narrow(out + c, load_wide(in + c) * factor);
    for (; c < columns; ++c) narrow(widen(in[c]) * factor, out[c]);
  }
}

// Σ a·b, short runs in the compute type and their sum in double.
template <class In>
double dot(const In* a, const In* b, int64_t count) {
  using T = Compute<In>;
  constexpr int64_t n = kLanes<T>;
  double total = 0;
  int64_t i = 0;
  while (i + n <= count) {
    const int64_t end = count - i < 64 * n ? count / n * n : i + 64 * n;
    Vector<T> sum[2] = {};
    for (; i + 2 * n <= end; i += 2 * n)
      for (int64_t j = 0; j < 2; ++j) sum[j] += load_wide(a + i + j * n) * load_wide(b + i + j * n);
    for (; i < end; i += n) sum[0] += load_wide(a + i) * load_wide(b + i);
    sum[0] += sum[1];
    for (int64_t j = 0; j < n; ++j) total += static_cast<double>(sum[0][j]);
  }
  for (; i < count; ++i) total += static_cast<double>(widen(a[i])) * static_cast<double>(widen(b[i]));
  return total;
}

// Σ a, in the same way.
template <class In>
double sum(const In* a, int64_t count) {
  using T = Compute<In>;
  constexpr int64_t n = kLanes<T>;
  double total = 0;
  int64_t i = 0;
  while (i + n <= count) {
    Vector<T> run{};
    for (const int64_t end = count - i < 64 * n ? count / n * n : i + 64 * n; i < end; i += n) run += load_wide(a + i);
    for (int64_t j = 0; j < n; ++j) total += static_cast<double>(run[j]);
  }
  for (; i < count; ++i) total += static_cast<double>(widen(a[i]));
  return total;
}

// out += v
template <class T, class Out>
void add_constant(Out* out, T v, int64_t count) {
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store_narrow(out + i, load_wide(out + i) + v);
  for (; i < count; ++i) narrow(static_cast<T>(widen(out[i])) + v, out[i]);
}

// out[j] = Σ_r rows[r·ld + j] over the first lanes of a vector, in the same way.
template <class T>
void sum_rows(const T* rows, int64_t count, int64_t ld, T* out, int64_t lanes) {
  constexpr int64_t n = kLanes<T>;
  double total[n] = {};
  for (int64_t r = 0; r < count;) {
    Vector<T> sum{};
    for (const int64_t end = count - r < 64 ? count : r + 64; r < end; ++r) sum += load<T>(rows + r * ld);
    for (int64_t j = 0; j < n; ++j) total[j] += static_cast<double>(sum[j]);
  }
  for (int64_t j = 0; j < lanes; ++j) out[j] = static_cast<T>(total[j]);
}

// out = Σ of `sources` vectors, four registers at a time.
template <class T>
void add_up(const T* const* sources, int64_t count, T* out, int64_t length) {
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + 4 * n <= length; i += 4 * n) {
    Vector<T> sum[4] = {};
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] += load<T>(sources[k] + i + j * n);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store<T>(out + i + j * n, sum[j]);
  }
  for (; i < length; i += n) {
    Vector<T> sum{};
    for (int64_t k = 0; k < count; ++k) sum += load<T>(sources[k] + i);
    store<T>(out + i, sum);
  }
}

// Runs body(task, scratch) for every task, tasks handed out one by one. prepare(Carver&) lays out a worker's memory and
// is called twice: to count, and to place; it returns what body gets. `begin` sees a worker's memory once before its
// tasks.
template <class Prepare, class Begin, class Body>
void share(const Runtime& runtime, int64_t tasks, const Prepare& prepare, const Begin& begin, const Body& body) {
  if (tasks <= 0) return;
  Carver count{0};
  prepare(count);
  struct Job {
    const Runtime& runtime;
    int64_t tasks, next;
    size_t bytes;
    const Prepare& prepare;
    const Begin& begin;
    const Body& body;
  } job{runtime, tasks, 0, count.used, prepare, begin, body};
  const int64_t threads = runtime.threads();
  runtime.parallel(
      threads < tasks ? threads : tasks,
      [](void* ctx) {
        Job& shared = *static_cast<Job*>(ctx);
        int64_t task = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
        if (task >= shared.tasks) return;
        Carver carver{reinterpret_cast<uintptr_t>(shared.runtime.scratch(kWorkerScratch, shared.bytes))};
        auto memory = shared.prepare(carver);
        shared.begin(memory);
        for (; task < shared.tasks; task = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED))
          shared.body(task, memory);
      },
      &job);
}

struct Range {
  int64_t begin, end;
};

inline Range part(int64_t n, int64_t parts, int64_t i) { return {n * i / parts, n * (i + 1) / parts}; }

// How a sum over samples is shared out: blocks of samples, each with its own sum of all weights, and within them parts
// of the weights' columns. It depends on the layer alone, and blocks are added up in order, so that results do not
// depend on the number of threads or on who did what. A block is worth its sum's traffic from some 256 positions and
// eight samples on; sums take 64 MiB at most.
struct Division {
  int64_t blocks, parts;
};

template <class T>
Division divide(int64_t B, int64_t positions, int64_t groups, int64_t weights, int64_t ld) {
  constexpr int64_t tasks = 16;
  const int64_t bytes = weights * static_cast<int64_t>(sizeof(T)), columns = (ld + 4 * kLanes<T> - 1) / (4 * kLanes<T>);
  int64_t blocks = bytes > (int64_t{1} << 19) ? B / 8 : B;
  const int64_t fit = bytes > 0 ? (int64_t{64} << 20) / bytes : tasks, useful = B * positions / 256;
  const int64_t limits[] = {tasks, fit, useful};
  for (const int64_t limit : limits) blocks = blocks < limit ? blocks : limit;
  if (blocks < 1) blocks = B > 0 ? 1 : 0;
  int64_t parts = groups > 1 || blocks == 0 ? 1 : tasks / blocks;
  if (parts > columns) parts = columns > 0 ? columns : 1;
  return {blocks, parts};
}

// out[n, m] = Σ_blocks partial[block][m, n], the partials with rows of ld.
template <class T>
void combine(const Runtime& runtime, const T* partial, int64_t blocks, int64_t stride, int64_t M, int64_t N, int64_t ld,
             T* out) {
  constexpr int64_t rows = 64;
  share(
      runtime, (M + rows - 1) / rows, [&](Carver& c) { return c.take<T>(rows * ld); }, [](T*) {},
      [&](int64_t task, T* total) {
        const int64_t begin = task * rows, count = M - begin < rows ? M - begin : rows;
        clear(total, count * ld);
        for (int64_t block = 0; block < blocks; ++block) {
          const T* from = partial + block * stride + begin * ld;
          for (int64_t i = 0; i < count * ld; i += kLanes<T>)
            store<T>(total + i, load<T>(total + i) + load<T>(from + i));
        }
        transpose<T>(total, ld, count, N, out + begin, M, T(1));
      });
}

}  // namespace bootgrad::BOOTGRAD_ISA
