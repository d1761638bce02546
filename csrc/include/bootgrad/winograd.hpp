// Convolutions of 3×3 kernels with stride 1 by Winograd's minimal filtering: a tile of 2×2 outputs from 4×4 inputs in
// 16 products in place of 36.
//
//   Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A      d 4×4 inputs, g 3×3 weights, Y 2×2 outputs
//
// summed over channels before Aᵀ…A, so that each of the 16 positions is one matrix product over channels. Transforms
// add, subtract and halve: rounding errors are about twice a plain sum's. Source: Lavin, Gray, arXiv 1509.09308.
//
//   U [16, C, ldo]       G g Gᵀ            V [tiles, 16, ldc]    Bᵀ d B of a run of tiles
//   xt [pixels + 1, ldc] x, channels last, and a pixel of zeros     M [tiles, 16, ldo] products
//   yt [pixels, ldo]     the output, channels last

namespace bootgrad::BOOTGRAD_ISA {

// Between vectors of 16 positions: rows of both transforms are combined first, columns after.
template <class T>
BOOTGRAD_INLINE void winograd_input(const T* const (&d)[16], int64_t c, T* out, int64_t ld) {
  Vector<T> rows[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector<T> d0 = load<T>(d[j] + c), d1 = load<T>(d[4 + j] + c), d2 = load<T>(d[8 + j] + c),
                    d3 = load<T>(d[12 + j] + c);
    rows[0][j] = d0 - d2, rows[1][j] = d1 + d2, rows[2][j] = d2 - d1, rows[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector<T>(&r)[4] = rows[i];
    store<T>(out + (4 * i) * ld, r[0] - r[2]);
    store<T>(out + (4 * i + 1) * ld, r[1] + r[2]);
    store<T>(out + (4 * i + 2) * ld, r[2] - r[1]);
    store<T>(out + (4 * i + 3) * ld, r[1] - r[3]);
  }
}

template <class T>
BOOTGRAD_INLINE void winograd_output(const T* m, int64_t ld, Vector<T> (&y)[4]) {
  Vector<T> rows[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector<T> m0 = load<T>(m + j * ld), m1 = load<T>(m + (4 + j) * ld), m2 = load<T>(m + (8 + j) * ld),
                    m3 = load<T>(m + (12 + j) * ld);
    rows[0][j] = m0 + m1 + m2, rows[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vector<T>(&r)[4] = rows[i];
    y[2 * i] = r[0] + r[1] + r[2], y[2 * i + 1] = r[1] - r[2] - r[3];
  }
}

// u = G g Gᵀ of a vector of weights, [9, n] at `taps`, or of the same turned around.
template <class T>
BOOTGRAD_INLINE void winograd_weights(const T* taps, bool turned, T* out, int64_t ld) {
  const T half = T(0.5);
  Vector<T> g[9], rows[4][3];
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) g[k] = load<T>(taps + (turned ? 8 - k : k) * kLanes<T>);
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Vector<T> ends = (g[j] + g[6 + j]) * half, middle = g[3 + j] * half;
    rows[0][j] = g[j], rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = g[6 + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector<T> ends = (rows[i][0] + rows[i][2]) * half, middle = rows[i][1] * half;
    store<T>(out + (4 * i) * ld, rows[i][0]);
    store<T>(out + (4 * i + 1) * ld, ends + middle);
    store<T>(out + (4 * i + 2) * ld, ends - middle);
    store<T>(out + (4 * i + 3) * ld, rows[i][2]);
  }
}

// A y Aᵀ of a vector of gradients of 2×2 outputs.
template <class T>
BOOTGRAD_INLINE void winograd_gradient(const T* const (&y)[4], int64_t o, T* out, int64_t ld) {
  Vector<T> rows[4][2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const Vector<T> y0 = load<T>(y[j] + o), y1 = load<T>(y[2 + j] + o);
    rows[0][j] = y0, rows[1][j] = y0 + y1, rows[2][j] = y0 - y1, rows[3][j] = -y1;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store<T>(out + (4 * i) * ld, rows[i][0]);
    store<T>(out + (4 * i + 1) * ld, rows[i][0] + rows[i][1]);
    store<T>(out + (4 * i + 2) * ld, rows[i][0] - rows[i][1]);
    store<T>(out + (4 * i + 3) * ld, -rows[i][1]);
  }
}

// Gᵀ u G of a vector of sums: [9, n].
template <class T>
BOOTGRAD_INLINE void winograd_taps(const Vector<T> (&u)[16], T* taps) {
  const T half = T(0.5);
  Vector<T> rows[3][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector<T> both = (u[4 + j] + u[8 + j]) * half, apart = (u[4 + j] - u[8 + j]) * half;
    rows[0][j] = u[j] + both, rows[1][j] = apart, rows[2][j] = both + u[12 + j];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const Vector<T> both = (rows[i][1] + rows[i][2]) * half, apart = (rows[i][1] - rows[i][2]) * half;
    store<T>(taps + (3 * i) * kLanes<T>, rows[i][0] + both);
    store<T>(taps + (3 * i + 1) * kLanes<T>, apart);
    store<T>(taps + (3 * i + 2) * kLanes<T>, both + rows[i][3]);
  }
}

template <class T>
struct Winograd {
  explicit Winograd(const WinogradCall& c) : call(c) {}

  void run() {
    prepare_tables();
    transform_weights();
    share(
        *call.runtime, (call.B + together - 1) / together,
        [&](Carver& c) {
          return Memory{c.take<T>((pixels + 1) * ldc), c.take<T>(chunk * v_tile), c.take<T>(chunk * m_tile),
                        c.take<T>(outputs * ldo)};
        },
        [&](const Memory& m) { clear(m.xt + pixels * ldc, ldc); },
        [&](int64_t task, const Memory& m) { images(task, m); });
  }

 private:
  static constexpr int64_t n = kLanes<T>;
  const WinogradCall& call;
  const int64_t C = call.C, O = call.O, ldc = round_up<T>(C), ldo = round_up<T>(O);
  const int64_t pixels = call.S[0] * call.S[1], outputs = call.P[0] * call.P[1];
  const int64_t down = (call.P[0] + 1) / 2, across = (call.P[1] + 1) / 2, tiles = down * across;
  // Tiles lie a vector further apart than they are long, so that they do not all fall into the same sets of a cache.
  const int64_t v_tile = 16 * ldc + n, m_tile = 16 * ldo + n, u_position = C * ldo + n;
  // A run of tiles: long enough to be worth the traffic of U, which does not always stay in a core's cache.
  static constexpr int64_t kRunOfTiles = 64;
  const int64_t together = tiles < kRunOfTiles ? kRunOfTiles / tiles : 1;  // images to a task
  const int64_t chunk = tiles * together < 2 * kRunOfTiles ? tiles * together : kRunOfTiles;
  T *u = nullptr, *bias = nullptr;
  int64_t *row = nullptr, *depth = nullptr;

  struct Memory {
    T *xt, *v, *m, *yt;
  };

  void prepare_tables() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kCenterScratch, c.used))};
      u = c.take<T>(16 * u_position);
      bias = c.take<T>(ldo);
      row = c.take<int64_t>(chunk);
      depth = c.take<int64_t>(C);
    }
    for (int64_t m = 0; m < chunk; ++m) row[m] = m * v_tile;
    for (int64_t k = 0; k < C; ++k) depth[k] = k;
    clear(bias, ldo);
    if (call.bias) copy_row(static_cast<const T*>(call.bias), bias, O);
  }

  // A task has a vector of output channels, of all input channels.
  void transform_weights() const {
    share(
        *call.runtime, ldo / n, [](Carver& c) { return c.take<T>(n * 9 * n); }, [](T*) {},
        [&](int64_t task, T* taps) {
          const int64_t o = task * n, lanes = O - o < n ? O - o : n;
          for (int64_t c = 0; c < C; c += n) {
            const int64_t count = C - c < n ? C - c : n;
            take_taps(o, lanes, c, count, taps);
            for (int64_t k = 0; k < count; ++k)
              winograd_weights<T>(taps + k * 9 * n, call.transposed, u + (c + k) * ldo + o, u_position);
          }
        });
  }

  // taps[c, k, o] of some channels.
  void take_taps(int64_t o, int64_t lanes, int64_t c, int64_t count, T* taps) const {
    const T* w = static_cast<const T*>(call.weight);
    if (lanes < n) clear(taps, n * 9 * n);
    if (!call.transposed) return transpose<T>(w + (o * C + c) * 9, C * 9, lanes, count * 9, taps, n, T(1));
    const T* const end = w + C * O * 9;
    for (int64_t k = 0; k < count; ++k, taps += 9 * n) {
      const T* from = w + ((c + k) * O + o) * 9;
      if (n >= 9 && lanes == n && from + (n - 1) * 9 + n <= end) {  // rows of nine in a square of n
        Vector<T> square[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) square[i] = load<T>(from + i * 9);
        transpose_square<T>(square);
#pragma GCC unroll 9
        for (int i = 0; i < 9 && i < n; ++i) store<T>(taps + i * n, square[i]);
      } else {
        transpose<T>(from, 9, lanes, 9, taps, n, T(1));
      }
    }
  }

  void images(int64_t task, const Memory& m) const {
    const int64_t begin = task * together, end = begin + together < call.B ? begin + together : call.B;
    // Of one image several runs, or one run of several images.
    const int64_t runs = together > 1 ? 1 : (tiles + chunk - 1) / chunk;
    if (together > 1) {
      for (int64_t b = begin; b < end; ++b) {
        take_image(b, m);
        transform_tiles(m, {0, tiles}, m.v + (b - begin) * tiles * v_tile);
      }
      multiply(m, (end - begin) * tiles);
      for (int64_t b = begin; b < end; ++b) {
        write_tiles(m, {0, tiles}, m.m + (b - begin) * tiles * m_tile);
        write_image(b, m);
      }
      return;
    }
    take_image(begin, m);
    for (int64_t r = 0; r < runs; ++r) {
      const Range range = part(tiles, runs, r);
      transform_tiles(m, range, m.v);
      multiply(m, range.end - range.begin);
      write_tiles(m, range, m.m);
    }
    write_image(begin, m);
  }

  void take_image(int64_t b, const Memory& m) const {
    transpose<T>(static_cast<const T*>(call.x) + b * C * pixels, pixels, C, pixels, m.xt, ldc, T(1));
  }

  void write_image(int64_t b, const Memory& m) const {
    transpose<T>(m.yt, ldo, outputs, O, static_cast<T*>(call.out) + b * O * outputs, outputs, T(1));
  }

  void transform_tiles(const Memory& m, Range range, T* v) const {
    for (int64_t t = range.begin; t < range.end; ++t, v += v_tile) {
      const int64_t top = t / across * 2 - call.padding[0], left = t % across * 2 - call.padding[1];
      const T* d[16];
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t h = top + i, w = left + j;
          const bool inside = h >= 0 && h < call.S[0] && w >= 0 && w < call.S[1];
          d[4 * i + j] = m.xt + (inside ? h * call.S[1] + w : pixels) * ldc;
        }
      for (int64_t c = 0; c < ldc; c += n) winograd_input<T>(d, c, v + c, ldc);
    }
  }

  void multiply(const Memory& m, int64_t count) const {
    for (int64_t k = 0; k < 16; ++k)
      gemm<T>(count, O, C, {m.v + k * ldc, row, depth}, u + k * u_position, ldo,
              Store<T>{m.m + k * ldo, m_tile, ldo, T(1), false, nullptr});
  }

  void write_tiles(const Memory& m, Range range, const T* products) const {
    for (int64_t t = range.begin; t < range.end; ++t, products += m_tile) {
      const int64_t h = t / across * 2, w = t % across * 2;
      const bool below = h + 1 < call.P[0], beside = w + 1 < call.P[1];
      T* y = m.yt + (h * call.P[1] + w) * ldo;
      const int64_t line = call.P[1] * ldo;
      for (int64_t o = 0; o < ldo; o += n) {
        Vector<T> out[4];
        winograd_output<T>(products + o, ldo, out);
        const Vector<T> shift = load<T>(bias + o);
        store<T>(y + o, out[0] + shift);
        if (beside) store<T>(y + ldo + o, out[1] + shift);
        if (below) store<T>(y + line + o, out[2] + shift);
        if (below && beside) store<T>(y + line + ldo + o, out[3] + shift);
      }
    }
  }
};

// The adjoint by the weights, Σ_i w_i Σ_tiles Gᵀ [ (A gy Aᵀ) ⊙ (Bᵀ d B) ] G: blocks of images have sums of their own,
// as many as the layer's shape says, and are added up in order.
//
//   sums [blocks, 16, O, ldc]     gyt [outputs + 1, ldo] gy, channels last, and zeros     z [tiles, 16, ldo] A gy Aᵀ
template <class T>
struct WinogradSum {
  explicit WinogradSum(const WinogradSumCall& c) : call(c) {}

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, c.used))};
      sums = c.take<T>(blocks * 16 * position);
      row = c.take<int64_t>(O);
      depth = c.take<int64_t>(chunk);
    }
    for (int64_t o = 0; o < O; ++o) row[o] = o;
    for (int64_t k = 0; k < chunk; ++k) depth[k] = k * z_tile;
    share(
        *call.runtime, blocks,
        [&](Carver& carver) {
          return Memory{carver.take<T>((pixels + 1) * ldc), carver.take<T>((outputs + 1) * ldo),
                        carver.take<T>(chunk * v_tile), carver.take<T>(chunk * z_tile)};
        },
        [&](const Memory& m) {
          clear(m.xt + pixels * ldc, ldc);
          clear(m.gyt + outputs * ldo, ldo);
        },
        [&](int64_t block, const Memory& m) {
          add_images(part(call.B, blocks, block), m, sums + block * 16 * position);
        });
    share(
        *call.runtime, O, [](Carver& carver) { return carver.take<T>(9 * n); }, [](T*) {},
        [&](int64_t o, T* taps) { finish(o, taps); });
  }

 private:
  static constexpr int64_t n = kLanes<T>;
  const WinogradSumCall& call;
  const int64_t C = call.C, O = call.O, ldc = round_up<T>(C), ldo = round_up<T>(O);
  const int64_t pixels = call.S[0] * call.S[1], outputs = call.P[0] * call.P[1];
  const int64_t down = (call.P[0] + 1) / 2, across = (call.P[1] + 1) / 2, tiles = down * across;
  const int64_t v_tile = 16 * ldc + n, z_tile = 16 * ldo + n, position = O * ldc + n;
  static constexpr int64_t chunk = 64;
  const int64_t blocks = count_blocks();
  T* sums = nullptr;
  int64_t *row = nullptr, *depth = nullptr;

  struct Memory {
    T *xt, *gyt, *v, *z;
  };

  // A block is worth its sum's traffic from some 256 tiles on; sums take 64 MiB at most.
  int64_t count_blocks() const {
    const int64_t worth = call.B * tiles / 256,
                  room = (int64_t{1} << 26) / (16 * position * static_cast<int64_t>(sizeof(T)));
    int64_t count = worth < room ? worth : room;
    count = count < call.B ? count : call.B;
    return count < 1 ? 1 : count;
  }

  void add_images(Range images, const Memory& m, T* sum) const {
    int64_t held = 0;  // tiles that wait to be multiplied
    bool first = true;
    for (int64_t b = images.begin; b < images.end; ++b) {
      const T weight = call.w ? static_cast<const T*>(call.w)[b] : T(1);
      transpose<T>(static_cast<const T*>(call.x) + b * C * pixels, pixels, C, pixels, m.xt, ldc, T(1));
      transpose<T>(static_cast<const T*>(call.gy) + b * O * outputs, outputs, O, outputs, m.gyt, ldo, weight);
      for (int64_t t = 0; t < tiles;) {
        const int64_t room = chunk - held, end = t + room < tiles ? t + room : tiles;
        for (; t < end; ++t, ++held) take_tile(t, m, m.v + held * v_tile, m.z + held * z_tile);
        if (held < chunk && (t < tiles || b + 1 < images.end)) continue;
        for (int64_t k = 0; k < 16; ++k)
          gemm<T>(O, C, held, {m.z + k * ldo, row, depth}, m.v + k * ldc, v_tile,
                  Store<T>{sum + k * position, ldc, ldc, T(1), !first, nullptr});
        first = false;
        held = 0;
      }
    }
    if (first) clear(sum, 16 * position);
  }

  void take_tile(int64_t t, const Memory& m, T* v, T* z) const {
    const int64_t h = t / across * 2, w = t % across * 2;
    const T* d[16];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j)
        d[4 * i + j] = at(m.xt, ldc, call.S, h - call.padding[0] + i, w - call.padding[1] + j);
    for (int64_t c = 0; c < ldc; c += n) winograd_input<T>(d, c, v + c, ldc);
    const T* y[4];
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t j = 0; j < 2; ++j) y[2 * i + j] = at(m.gyt, ldo, call.P, h + i, w + j);
    for (int64_t o = 0; o < ldo; o += n) winograd_gradient<T>(y, o, z + o, ldo);
  }

  // A pixel's channels; those of the pixel of zeros outside of the plane.
  static const T* at(const T* plane, int64_t ld, const int64_t* size, int64_t h, int64_t w) {
    const bool inside = h >= 0 && h < size[0] && w >= 0 && w < size[1];
    return plane + (inside ? h * size[1] + w : size[0] * size[1]) * ld;
  }

  void finish(int64_t o, T* taps) const {
    for (int64_t c = 0; c < C; c += n) {
      Vector<T> u[16];
      for (int64_t k = 0; k < 16; ++k) {
        const T* from = sums + k * position + o * ldc + c;
        u[k] = load<T>(from);
        for (int64_t block = 1; block < blocks; ++block) u[k] += load<T>(from + block * 16 * position);
      }
      winograd_taps<T>(u, taps);
      T* out = static_cast<T*>(call.out) + (o * C + c) * 9;
      const int64_t count = C - c < n ? C - c : n;
      for (int64_t l = 0; l < count; ++l)
        for (int64_t k = 0; k < 9; ++k) out[l * 9 + k] = taps[k * n + l];
    }
  }
};

inline void winograd(const WinogradCall& call) { Winograd<float>(call).run(); }
inline void winograd_sum(const WinogradSumCall& call) { WinogradSum<float>(call).run(); }

}  // namespace bootgrad::BOOTGRAD_ISA
