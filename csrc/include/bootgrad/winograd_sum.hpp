// The adjoint by the weights, Σ_i w_i Σ_tiles Gᵀ [ (A gy Aᵀ) ⊙ (Bᵀ d B) ] G: blocks of images have sums of their own,
// as many as the layer's shape says, and are added up in order. Where they are few, each is made in parts of the
// output's channels.
//
//   sums [blocks, 16, O, ldc]     gyt [positions of a band + 1, ldz] a part of gy, channels last, and zeros
//   z [tiles, 16, ldz] A gy Aᵀ

namespace bootgrad::BOOTGRAD_ISA {

template <class T>
struct WinogradSum {
  explicit WinogradSum(const WinogradSumCall& c) : call(c) {}

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, c.used))};
      sums = c.take<T>(blocks * 16 * position);
      row = c.take<int64_t>(ldz);
      depth = c.take<int64_t>(chunk);
    }
    for (int64_t o = 0; o < ldz; ++o) row[o] = o;
    for (int64_t k = 0; k < chunk; ++k) depth[k] = k * z_tile;
    share(
        *call.runtime, blocks * parts,
        [&](Carver& carver) {
          return Memory{in.take_memory(carver), carver.take<T>((positions + 1) * ldz),
                        carver.take<T>(chunk * in.v_tile), carver.take<T>(chunk * z_tile)};
        },
        [&](const Memory& m) {
          in.clear_memory(m.xt);
          clear(m.gyt + positions * ldz, ldz);
        },
        [&](int64_t task, const Memory& m) {
          const Range vectors = part(in.ldo / n, parts, task % parts);
          const Range channels{vectors.begin * n, vectors.end * n < O ? vectors.end * n : O};
          add_images(part(call.B, blocks, task / parts), channels, m, sums + task / parts * 16 * position);
        });
    share(
        *call.runtime, O, [](Carver& carver) { return carver.take<T>(9 * n); }, [](T*) {},
        [&](int64_t o, T* taps) { finish(o, taps); });
  }

 private:
  static constexpr int64_t n = kLanes<T>, chunk = WinogradInput<T>::kRun;
  const WinogradSumCall& call;
  const WinogradInput<T> in{call, 1};
  const int64_t C = in.C, O = in.O, ldc = in.ldc, position = O * ldc + n;
  const int64_t blocks = count_blocks(), parts = count_parts();
  const int64_t ldz = (in.ldo / n + parts - 1) / parts * n, z_tile = 16 * ldz + n;
  const int64_t positions = 2 * in.rows * call.P[1];
  T* sums = nullptr;
  int64_t *row = nullptr, *depth = nullptr;

  struct Memory {
    T *xt, *gyt, *v, *z;
  };

  // A block is worth its sum's traffic from some 256 tiles on; several together take 16 MiB at most.
  int64_t count_blocks() const {
    const int64_t worth = call.B * in.tiles / 256;
    int64_t count = (int64_t{16} << 20) / (16 * O * ldc * static_cast<int64_t>(sizeof(T)));
    const int64_t bounds[] = {worth, call.B, 16};
    for (const int64_t bound : bounds) count = bound < count ? bound : count;
    return count < 1 ? 1 : count;
  }

  // Each transforms the tiles of x anew: little beside the products with 128 channels.
  int64_t count_parts() const {
    const int64_t wanted = (8 + blocks - 1) / blocks, worth = O / 128;
    const int64_t count = wanted < worth ? wanted : worth;
    return count < 1 ? 1 : count;
  }

  void add_images(Range images, Range channels, const Memory& m, T* sum) const {
    const int64_t width = channels.end - channels.begin;
    T* const target = sum + channels.begin * ldc;
    int64_t waiting = 0;  // tiles that wait to be multiplied
    bool first = true;
    const auto multiply = [&] {
      for (int64_t k = 0; k < 16; ++k)
        gemm<T>(width, C, waiting, {m.z + k * ldz, row, depth}, m.v + k * ldc, in.v_tile,
                Store<T>{target + k * position, ldc, ldc, T(1), !first, nullptr});
      first = false, waiting = 0;
    };
    for (int64_t b = images.begin; b < images.end; ++b) {
      const T weight = call.w ? static_cast<const T*>(call.w)[b] : T(1);
      const T* gy = static_cast<const T*>(call.gy) + (b * O + channels.begin) * in.outputs;
      for (int64_t r = 0; r < in.bands; ++r) {
        const WinogradBand band = in.band(r);
        const int64_t begin = 2 * band.begin, end = 2 * band.end < call.P[0] ? 2 * band.end : call.P[0];
        in.take(b, band, m.xt);
        transpose<T>(gy + begin * call.P[1], in.outputs, width, (end - begin) * call.P[1], m.gyt, ldz, weight);
        for (int64_t t = 0; t < (band.end - band.begin) * in.across; ++t) {
          in.transform(t, band, m.xt, m.v + waiting * in.v_tile);
          transform_gradient(t, end - begin, m.gyt, m.z + waiting * z_tile);
          if (++waiting == chunk) multiply();
        }
      }
    }
    if (waiting || first) multiply();  // with no tile at all it stores zeros
  }

  // Tile t of a band that has so many lines of outputs.
  void transform_gradient(int64_t t, int64_t lines, const T* gyt, T* z) const {
    const int64_t h = t / in.across * 2, w = t % in.across * 2;
    const bool below = h + 1 < lines, beside = w + 1 < call.P[1];
    const int64_t at = h * call.P[1] + w;
    const T* y[4] = {gyt + at * ldz, gyt + (beside ? at + 1 : positions) * ldz,
                     gyt + (below ? at + call.P[1] : positions) * ldz,
                     gyt + (below && beside ? at + call.P[1] + 1 : positions) * ldz};
    for (int64_t o = 0; o < ldz; o += n) winograd_gradient<T>(y, o, z + o, ldz);
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

inline void winograd_sum(const WinogradSumCall& call) { WinogradSum<float>(call).run(); }

}  // namespace bootgrad::BOOTGRAD_ISA
