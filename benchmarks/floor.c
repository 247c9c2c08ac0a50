// The arithmetic of a loss and nothing else: what no kernel can undercut on this machine. Built with -march=native.
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float vec __attribute__((vector_size(WIDTH)));
typedef int ivec __attribute__((vector_size(WIDTH)));
enum { LANES = WIDTH / sizeof(float), CHAINS = 12 };

static float multiply_adds(double count) {
  vec sum[CHAINS] = {}, x = {}, total = {};
  x += 0.999f;
  for (int k = 0; k < CHAINS; ++k) sum[k] += (float)k;  // no two alike: the compiler would compute them once
  for (long n = count / (CHAINS * LANES); n > 0; --n)
    for (int k = 0; k < CHAINS; ++k) sum[k] = sum[k] * x + x;
  for (int k = 0; k < CHAINS; ++k) total += sum[k];
  return total[0];
}

// exp2 as in csrc/cpu/vec.inl
static float exponentials(double count) {
  static const float c[] = {1.f, 0.6931472f, 0.2402265f, 0.0555033f, 0.0096185f, 0.00134f, 0.00015346f};
  vec total = {}, x = {};
  for (int l = 0; l < LANES; ++l) x[l] = -l;
  for (long n = count / LANES; n > 0; --n) {
    vec shifted = x + 12582912.f, f = x - (shifted - 12582912.f), p = f * 0 + c[6];
    for (int d = 6; d-- > 0;) p = p * f + c[d];
    ivec bits = (ivec)p + ((ivec)shifted << 23);
    total += (vec)((x >= -126.f) & bits);
    x += -1e-9f;
  }
  return total[0];
}

// Shares the given numbers of multiply-adds and exponentials among threads.
float arithmetic(double fma, double exp, int threads) {
  float result = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : result)
  for (int t = 0; t < threads; ++t) result += multiply_adds(fma / threads) + exponentials(exp / threads);
  return result;
}
