// Per-sample gradients of embeddings, E_i = Σ_n onehot(token_n) ⊗ gy_n: rows of a table, at the cost of the tokens.
//
// Look-ups of one token are a group, found by hashing; a group's rows of gy are added up column by column in registers,
// short runs in the compute type and their sum in double, so that nothing of the size of a table is made.

namespace bootgrad::BOOTGRAD_ISA {

// Which look-ups have one token, groups in the order of their first ones.
struct TokenGroups {
  int64_t count;   // of groups
  int64_t* token;  // [count]
  int64_t* start;  // [count + 1]
  int64_t* order;  // look-ups, rising, those of one group together
  int64_t* of;     // [n] the group of each, −1 where there is no token
  int64_t* next;   // [count] where the group's next look-up goes
  int64_t* slots;  // a power of two of them, group + 1 or 0

  static TokenGroups take(Carver& c, int64_t n) {
    return {0,
            c.take<int64_t>(n),
            c.take<int64_t>(n + 1),
            c.take<int64_t>(n),
            c.take<int64_t>(n),
            c.take<int64_t>(n),
            c.take<int64_t>(int64_t{1} << bits_for(n))};
  }

  void find(const int64_t* tokens, int64_t n) {
    const int bits = bits_for(n);
    clear(slots, int64_t{1} << bits);
    count = start[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
      of[i] = tokens[i] < 0 ? -1 : group_of(tokens[i], bits);
      if (of[i] >= 0) ++start[of[i] + 1];
    }
    for (int64_t g = 0; g < count; ++g) {
      next[g] = start[g];
      start[g + 1] += start[g];
    }
    for (int64_t i = 0; i < n; ++i)
      if (of[i] >= 0) order[next[of[i]]++] = i;
  }

 private:
  // At least twice as many slots as look-ups.
  static int bits_for(int64_t n) {
    int bits = 1;
    while (int64_t{1} << bits < 2 * n) ++bits;
    return bits;
  }

  int64_t group_of(int64_t wanted, int bits) {
    const uint64_t last = (uint64_t{1} << bits) - 1;
    uint64_t at = (static_cast<uint64_t>(wanted) * 0x9E3779B97F4A7C15u) >> (64 - bits);
    while (slots[at] && token[slots[at] - 1] != wanted) at = (at + 1) & last;
    if (!slots[at]) {
      token[count++] = wanted;
      start[count] = 0;
      slots[at] = count;
    }
    return slots[at] - 1;
  }
};

// sum[j] = Σ_k factor[order[k]] · rows[order[k], j] over `vectors` vectors of columns.
template <int vectors, class In, class T = Compute<In>>
BOOTGRAD_INLINE void sum_group(const In* rows, int64_t ld, const int64_t* order, int64_t n, const T* factor,
                               Vector<T> (&sum)[vectors]) {
  constexpr int64_t lanes = kLanes<T>, run = 64;
  const auto add_run = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[j] = Vector<T>{};
    for (int64_t k = begin; k < end; ++k) {
      const In* row = rows + order[k] * ld;
      const T f = factor ? factor[order[k]] : T(1);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[j] += load_wide(row + j * lanes) * f;
    }
  };
  if (n <= run) return add_run(0, n);
  double total[vectors * lanes] = {};
  for (int64_t k = 0; k < n; k += run) {
    add_run(k, n < k + run ? n : k + run);
    for (int j = 0; j < vectors; ++j)
      for (int64_t l = 0; l < lanes; ++l) total[j * lanes + l] += static_cast<double>(sum[j][l]);
  }
  for (int j = 0; j < vectors; ++j)
    for (int64_t l = 0; l < lanes; ++l) sum[j][l] = static_cast<T>(total[j * lanes + l]);
}

// The same of one column.
template <class In, class T = Compute<In>>
T sum_group(const In* column, int64_t ld, const int64_t* order, int64_t n, const T* factor) {
  double total = 0;
  for (int64_t k = 0; k < n; ++k)
    total += static_cast<double>(widen(column[order[k] * ld])) * static_cast<double>(factor ? factor[order[k]] : T(1));
  return static_cast<T>(total);
}

template <class In>
struct Embedding {
  using T = Compute<In>;

  explicit Embedding(const EmbeddingCall& c) : call(c) {}

  void run() const {
    int64_t longest = 0;
    for (int64_t b = 0; b < call.B; ++b) longest = length(b) > longest ? length(b) : longest;
    // Beside the partial norms of samples: ‖c_v‖² of the center's rows.
    double *partial = nullptr, *norms = nullptr;
    Carver count{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) count = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, count.used))};
      partial = count.take<double>(call.B * parts);
      norms = count.take<double>(call.center ? call.V : 0);
    }
    const double center = call.center ? center_norms(norms) : 0;
    share(
        *call.runtime, call.B * parts, [&](Carver& c) { return TokenGroups::take(c, longest); },
        [](const TokenGroups&) {},
        [&](int64_t task, TokenGroups groups) {
          const int64_t b = task / parts, part = task % parts;
          groups.find(call.tokens + call.bounds[b], length(b));
          partial[task] = one_part(b, part * kColumns, groups);
          if (part > 0 || !call.center) return;
          double elsewhere = center;
          for (int64_t g = 0; g < groups.count; ++g) elsewhere -= norms[groups.token[g]];
          partial[task] += elsewhere > 0 ? elsewhere : 0;
        });
    for (int64_t b = 0; b < call.B; ++b) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[b * parts + part];
      static_cast<T*>(call.sq_norms)[b] = static_cast<T>(total);
    }
  }

 private:
  static constexpr int64_t n = kLanes<T>, kColumns = 512;
  const EmbeddingCall& call;
  const int64_t parts = call.D > kColumns ? (call.D + kColumns - 1) / kColumns : 1;

  int64_t length(int64_t b) const { return call.bounds[b + 1] - call.bounds[b]; }
  const T* center_row(int64_t token) const {
    return call.center ? static_cast<const T*>(call.center) + token * call.D : nullptr;
  }

  double center_norms(double* norms) const {
    constexpr int64_t together = 64;
    share(
        *call.runtime, (call.V + together - 1) / together, [](Carver&) { return 0; }, [](int) {},
        [&](int64_t task, int) {
          for (int64_t v = task * together; v < call.V && v < (task + 1) * together; ++v)
            norms[v] = dot(center_row(v), center_row(v), call.D);
        });
    double total = 0;
    for (int64_t v = 0; v < call.V; ++v) total += norms[v];
    return total;
  }

  // The squares of the sample's rows of E_i − c in some columns, which are written where they are wanted.
  double one_part(int64_t b, int64_t begin, const TokenGroups& groups) const {
    const int64_t end = call.D < begin + kColumns ? call.D : begin + kColumns;
    const In* gy = static_cast<const In*>(call.gy) + call.bounds[b] * call.D;
    In* out = call.rows ? static_cast<In*>(call.rows) + call.bounds[b] * call.D : nullptr;
    if (out)
      for (int64_t i = 0; i < length(b); ++i)
        if (groups.of[i] < 0) clear(out + i * call.D + begin, end - begin);
    double total = 0;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t* order = groups.order + groups.start[g];
      const int64_t many = groups.start[g + 1] - groups.start[g];
      const T* center = center_row(groups.token[g]);
      Vector<T> squares{};
      int64_t d = begin;
      for (; d + 4 * n <= end; d += 4 * n) columns<4>(gy, out, order, many, center, d, squares);
      for (; d + n <= end; d += n) columns<1>(gy, out, order, many, center, d, squares);
      for (int64_t l = 0; l < n; ++l) total += static_cast<double>(squares[l]);
      for (; d < end; ++d) {
        const T apart =
            sum_group(gy + d, call.D, order, many, static_cast<const T*>(nullptr)) - (center ? center[d] : T(0));
        total += static_cast<double>(apart) * static_cast<double>(apart);
        if (out)
          for (int64_t k = 0; k < many; ++k) narrow(apart, out[order[k] * call.D + d]);
      }
    }
    return total;
  }

  template <int vectors>
  BOOTGRAD_INLINE void columns(const In* gy, In* out, const int64_t* order, int64_t many, const T* center, int64_t d,
                               Vector<T>& squares) const {
    Vector<T> sum[vectors];
    sum_group<vectors>(gy + d, call.D, order, many, static_cast<const T*>(nullptr), sum);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      if (center) sum[j] -= load<T>(center + d + j * n);
      squares += sum[j] * sum[j];
    }
    if (!out) return;
    for (int64_t k = 0; k < many; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) store_narrow(out + order[k] * call.D + d + j * n, sum[j]);
  }
};

// ⟨E_i, v⟩ = Σ_n ⟨gy_n, v[token_n]⟩
template <class In>
struct EmbeddingJvp {
  using T = Compute<In>;
  const EmbeddingCall& call;

  void run() const {
    share(
        *call.runtime, call.B, [](Carver&) { return 0; }, [](int) {},
        [&](int64_t b, int) {
          double total = 0;
          for (int64_t i = call.bounds[b]; i < call.bounds[b + 1]; ++i)
            if (call.tokens[i] >= 0) total += of_row(i);
          static_cast<T*>(call.inner)[b] = static_cast<T>(total);
        });
  }

 private:
  double of_row(int64_t i) const {
    constexpr int64_t n = kLanes<T>;
    const In* gy = static_cast<const In*>(call.gy) + i * call.D;
    const T* v = static_cast<const T*>(call.center) + call.tokens[i] * call.D;
    double total = 0;
    int64_t d = 0;
    while (d + n <= call.D) {
      Vector<T> run{};
      for (const int64_t end = call.D - d < 64 * n ? call.D / n * n : d + 64 * n; d < end; d += n)
        run += load_wide(gy + d) * load<T>(v + d);
      for (int64_t l = 0; l < n; ++l) total += static_cast<double>(run[l]);
    }
    for (; d < call.D; ++d) total += static_cast<double>(widen(gy[d])) * static_cast<double>(v[d]);
    return total;
  }
};

// Σ_i w_i E_i, whose other rows are zero already: groups of the whole batch, a few at a time.
template <class In>
struct EmbeddingSum {
  using T = Compute<In>;
  const EmbeddingCall& call;

  void run() const {
    TokenGroups groups{};
    T* factor = nullptr;
    Carver count{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) count = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, count.used))};
      groups = TokenGroups::take(count, call.N);
      factor = call.w ? count.take<T>(call.N) : nullptr;
    }
    groups.find(call.tokens, call.N);
    if (call.w)
      for (int64_t b = 0; b < call.B; ++b)
        for (int64_t i = call.bounds[b]; i < call.bounds[b + 1]; ++i) factor[i] = static_cast<const T*>(call.w)[b];
    // Some 8,192 numbers of gy to a task.
    const int64_t together = call.D < 8192 ? 8192 / call.D : 1;
    share(
        *call.runtime, (groups.count + together - 1) / together, [](Carver&) { return 0; }, [](int) {},
        [&](int64_t task, int) {
          for (int64_t g = task * together; g < groups.count && g < (task + 1) * together; ++g)
            one_row(groups.token[g], groups.order + groups.start[g], groups.start[g + 1] - groups.start[g], factor);
        });
  }

 private:
  void one_row(int64_t token, const int64_t* order, int64_t many, const T* factor) const {
    constexpr int64_t n = kLanes<T>;
    const In* gy = static_cast<const In*>(call.gy);
    T* out = static_cast<T*>(call.sum) + token * call.D;
    int64_t d = 0;
    for (; d + 4 * n <= call.D; d += 4 * n) {
      Vector<T> sum[4];
      sum_group<4>(gy + d, call.D, order, many, factor, sum);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store<T>(out + d + j * n, sum[j]);
    }
    for (; d + n <= call.D; d += n) {
      Vector<T> sum[1];
      sum_group<1>(gy + d, call.D, order, many, factor, sum);
      store<T>(out + d, sum[0]);
    }
    for (; d < call.D; ++d) out[d] = sum_group(gy + d, call.D, order, many, factor);
  }
};

template <class In>
void embedding_of(const EmbeddingCall& call) {
  if (call.sum) return EmbeddingSum<In>{call}.run();
  if (call.inner) return EmbeddingJvp<In>{call}.run();
  Embedding<In>(call).run();
}

inline void embedding(const EmbeddingCall& call) {
  switch (call.dtype) {
    case DType::f32: return embedding_of<float>(call);
    case DType::f64: return embedding_of<double>(call);
    case DType::bf16: return embedding_of<bf16>(call);
    case DType::f16: return embedding_of<f16>(call);
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA
