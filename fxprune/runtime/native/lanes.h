// Vectors of 32-bit lanes: AVX512-VNNI, AVX2 (with or without VNNI), and plain C++ for every other processor.
//
// All three have the same functions and give the same bits: products of bytes are exact, floats are rounded after every
// operation, halves to even. What the functions do is said where they are first, in lanes_avx512.h.
#pragma once

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels take the first of four bytes for the lowest of a word"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define FXPRUNE_AVX512 1
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif
