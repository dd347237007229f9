/* Gaussian noise in 16-bit floating point: random bits, quantiles and the sum in one pass over memory.

   The numbers are those of half_precision.py, to the last bit: NumPy's SFC64 gives four groups of 16 bits a
   step, each of which chooses a quantile of a table. kernel.py compiles this file. */

#include <stdint.h>
#include <string.h>

#define PART 8192           /* numbers that a thread holds at a time */
#define BLOCK (32 * PART)   /* numbers whose bits are drawn before the threads share them out */
#define ENOUGH 16384        /* sums that are worth a second thread */

static _Thread_local uint64_t words[BLOCK / 4]; /* not on the stack, which threads may have little of */

static const uint16_t *draw(uint64_t *state, int64_t count) {
  uint64_t a = state[0], b = state[1], c = state[2], counter = state[3];
  for (int64_t i = 0; i < (count + 3) / 4; i++) {
    const uint64_t word = a + b + counter++;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = ((c << 24) | (c >> 40)) + word;
    words[i] = word;
  }
  state[0] = a, state[1] = b, state[2] = c, state[3] = counter;
  return (const uint16_t *)words;
}

static inline float widened(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* To the nearest bfloat16, ties to even, as torch rounds; NaN stays one. */
static inline uint16_t rounded(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7fc0 : (uint16_t)nearest;
}

/* y[i] = x[i] + noise[i] for `images` images of `size` bfloat16 numbers, one after another. signs: 1 adds the
   noise, -1 subtracts it, 0 adds it to these images and subtracts it from as many behind them. */
void add_noise(uint64_t *state, const uint16_t *table, const uint16_t *x, uint16_t *y, int64_t size,
               int64_t images, int signs, int threads) {
  const int64_t all = signs ? images : 2 * images;
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t block = size - start < BLOCK ? size - start : BLOCK;
    const uint16_t *bits = draw(state, block);
#pragma omp parallel for num_threads(threads) if (threads > 1 && block * all > ENOUGH)
    for (int64_t part = 0; part < block; part += PART) {
      const int64_t count = block - part < PART ? block - part : PART;
      float noise[PART];
      for (int64_t i = 0; i < count; i++) noise[i] = widened(table[bits[part + i]]);
      if (signs < 0)
        for (int64_t i = 0; i < count; i++) noise[i] = -noise[i];
      for (int64_t image = 0; image < all; image++) {
        const int64_t place = image * size + start + part;
        const uint16_t *from = x + place;
        uint16_t *to = y + place;
        if (image < images)
          for (int64_t i = 0; i < count; i++) to[i] = rounded(widened(from[i]) + noise[i]);
        else
          for (int64_t i = 0; i < count; i++) to[i] = rounded(widened(from[i]) - noise[i]);
      }
    }
  }
}

/* The noise itself: entries of a table, of any type of 16 bits, or two numbers of 16 bits at a time. */
#define FILL(name, type)                                                                              \
  void name(uint64_t *state, const type *table, type *y, int64_t size, int threads) {                 \
    for (int64_t start = 0; start < size; start += BLOCK) {                                           \
      const int64_t block = size - start < BLOCK ? size - start : BLOCK;                              \
      const uint16_t *bits = draw(state, block);                                                      \
      _Pragma("omp parallel for num_threads(threads) if (threads > 1 && block > ENOUGH)")             \
      for (int64_t part = 0; part < block; part += PART)                                              \
        for (int64_t i = part; i < part + PART && i < block; i++) y[start + i] = table[bits[i]];      \
    }                                                                                                 \
  }

FILL(fill16, uint16_t)
FILL(fill32, uint32_t)
