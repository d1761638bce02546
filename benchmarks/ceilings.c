// Multiply-adds as fast as a core starts them: independent chains of vectors that never leave its registers, more of
// them than a multiply-add takes cycles times how many start in a cycle.

#if defined(__AVX512F__)
enum { kVectorBytes = 64, kChains = 24 };  // of 32 registers
#define CHAINS(f) EIGHT(f, 0) EIGHT(f, 1) EIGHT(f, 2)
#elif defined(__AVX__)
enum { kVectorBytes = 32, kChains = 12 };  // of 16
#define CHAINS(f) EIGHT(f, 0) FOUR(f, 1)
#elif defined(__aarch64__)
enum { kVectorBytes = 16, kChains = 24 };
#define CHAINS(f) EIGHT(f, 0) EIGHT(f, 1) EIGHT(f, 2)
#else
enum { kVectorBytes = 16, kChains = 12 };
#define CHAINS(f) EIGHT(f, 0) FOUR(f, 1)
#endif
#define FOUR(f, n) f(n##0) f(n##1) f(n##2) f(n##3)
#define EIGHT(f, n) FOUR(f, n) f(n##4) f(n##5) f(n##6) f(n##7)

typedef float Vector __attribute__((vector_size(kVectorBytes)));

const int lanes = kVectorBytes / sizeof(float);
const int entries = kChains * kVectorBytes / sizeof(float);  // that every round multiplies and adds to

// a <- a m + c, `rounds` times for every entry; the sum over entries. Named variables, since an array would be kept in
// memory.
float multiply_adds(long rounds, float m, float c) {
  const Vector ms = m + (Vector){0}, cs = c + (Vector){0};
#define BEGIN(k) Vector a##k = cs * 1##k##.0f;  // each from another number, or a compiler makes them one
  CHAINS(BEGIN)
  for (long r = 0; r < rounds; ++r) {
#define STEP(k) a##k = a##k * ms + cs;
    CHAINS(STEP)
  }
  Vector total = {0};
#define ADD(k) total += a##k;
  CHAINS(ADD)
  float sum = 0;
  for (int k = 0; k < lanes; ++k) sum += total[k];
  return sum;
}
