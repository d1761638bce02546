// A convolution of a 3×3 kernel by the tiles of winograd_tiles.hpp.
//
//   U [16, C, ldo]        G g Gᵀ                                 V [tiles, 16, ldc]  Bᵀ d B of a run of tiles
//   xt [pixels + 1, ldc]  a band of x, channels last, and zeros  M [tiles, 16, ldo]  products
//   yt [positions, ldo]   the band's output, channels last

namespace bootgrad::BOOTGRAD_ISA {

template <class T>
struct Winograd {
  explicit Winograd(const WinogradCall& c) : call(c) {}

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, c.used))};
      u = c.take<T>(16 * u_position);
      bias = c.take<T>(ldo);
      row = c.take<int64_t>(chunk);
      depth = c.take<int64_t>(C);
    }
    for (int64_t m = 0; m < chunk; ++m) row[m] = m * in.v_tile;
    for (int64_t k = 0; k < C; ++k) depth[k] = k;
    clear(bias, ldo);
    if (call.bias) copy_row(static_cast<const T*>(call.bias), bias, O);
    transform_weights();
    share(
        *call.runtime, (call.B + together - 1) / together * in.bands,
        [&](Carver& carver) {
          return Memory{in.take_memory(carver), carver.take<T>(chunk * in.v_tile), carver.take<T>(chunk * m_tile),
                        carver.take<T>(2 * in.rows * call.P[1] * ldo)};
        },
        [&](const Memory& m) { in.clear_memory(m.xt); },
        [&](int64_t task, const Memory& m) {
          together > 1 ? small_images(task * together, m) : band_of_image(task / in.bands, in.band(task % in.bands), m);
        });
  }

 private:
  static constexpr int64_t n = kLanes<T>, kRun = WinogradInput<T>::kRun;
  const WinogradCall& call;
  const WinogradInput<T> in{call, 16};
  const int64_t C = in.C, O = in.O, ldc = in.ldc, ldo = in.ldo;
  const int64_t m_tile = 16 * ldo + n, u_position = C * ldo + n;
  const int64_t together = in.tiles < kRun ? kRun / in.tiles : 1;  // images to a task, where they are small
  const int64_t most = together > 1 ? in.tiles * together : in.rows * in.across;
  const int64_t chunk = most < 2 * kRun ? most : kRun;  // tiles that are multiplied at once
  T *u = nullptr, *bias = nullptr;
  int64_t *row = nullptr, *depth = nullptr;

  struct Memory {
    T *xt, *v, *m, *yt;
  };

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
    [[maybe_unused]] const T* const end = w + C * O * 9;
    for (int64_t k = 0; k < count; ++k, taps += 9 * n) {
      const T* from = w + ((c + k) * O + o) * 9;
      if constexpr (n >= 9) {
        if (lanes == n && from + (n - 1) * 9 + n <= end) {  // rows of nine in a square of n
          Vector<T> square[n];
#pragma GCC unroll 16
          for (int i = 0; i < n; ++i) square[i] = load<T>(from + i * 9);
          transpose_square<T>(square);
#pragma GCC unroll 9
          for (int i = 0; i < 9; ++i) store<T>(taps + i * n, square[i]);
          continue;
        }
      }
      transpose<T>(from, 9, lanes, 9, taps, n, T(1));
    }
  }

  void small_images(int64_t begin, const Memory& m) const {
    const int64_t end = begin + together < call.B ? begin + together : call.B;
    const WinogradBand whole = in.band(0);
    for (int64_t b = begin; b < end; ++b) {
      in.take(b, whole, m.xt);
      for (int64_t t = 0; t < in.tiles; ++t)
        in.transform(t, whole, m.xt, m.v + ((b - begin) * in.tiles + t) * in.v_tile);
    }
    multiply(m, (end - begin) * in.tiles);
    for (int64_t b = begin; b < end; ++b) {
      write_tiles(whole, {0, in.tiles}, m.m + (b - begin) * in.tiles * m_tile, m.yt);
      write(b, whole, m.yt);
    }
  }

  void band_of_image(int64_t b, const WinogradBand& band, const Memory& m) const {
    const int64_t tiles = (band.end - band.begin) * in.across, runs = (tiles + chunk - 1) / chunk;
    in.take(b, band, m.xt);
    for (int64_t r = 0; r < runs; ++r) {
      const Range range = part(tiles, runs, r);
      for (int64_t t = range.begin; t < range.end; ++t)
        in.transform(t, band, m.xt, m.v + (t - range.begin) * in.v_tile);
      multiply(m, range.end - range.begin);
      write_tiles(band, range, m.m, m.yt);
    }
    write(b, band, m.yt);
  }

  void multiply(const Memory& m, int64_t count) const {
    for (int64_t k = 0; k < 16; ++k)
      gemm<T>(count, O, C, {m.v + k * ldc, row, depth}, u + k * u_position, ldo,
              Store<T>{m.m + k * ldo, m_tile, ldo, T(1), false, nullptr});
  }

  void write_tiles(const WinogradBand& band, Range range, const T* products, T* yt) const {
    const int64_t line = call.P[1] * ldo;
    for (int64_t t = range.begin; t < range.end; ++t, products += m_tile) {
      const int64_t h = t / in.across * 2, w = t % in.across * 2;
      const bool below = 2 * band.begin + h + 1 < call.P[0], beside = w + 1 < call.P[1];
      T* y = yt + h * line + w * ldo;
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

  void write(int64_t b, const WinogradBand& band, const T* yt) const {
    const int64_t begin = 2 * band.begin, end = 2 * band.end < call.P[0] ? 2 * band.end : call.P[0];
    transpose<T>(yt, ldo, (end - begin) * call.P[1], O,
                 static_cast<T*>(call.out) + b * O * in.outputs + begin * call.P[1], in.outputs, T(1));
  }
};

inline void winograd(const WinogradCall& call) { Winograd<float>(call).run(); }

}  // namespace bootgrad::BOOTGRAD_ISA
