// Compiler quirks, each named with the compiler that needs it. Nothing else in the tree asks which
// compiler it is.
#pragma once

// nvcc compiles a function for both sides only when told so; host compilers know no such word.
#if defined(__CUDACC__)
#define MAMBA_HOST_DEVICE __host__ __device__
#else
#define MAMBA_HOST_DEVICE
#endif

// GCC and Clang spell the promise of non-aliasing pointers differently from cl.exe; all three
// accept
// __restrict.
#define MAMBA_RESTRICT __restrict

// The CPU kernels rely on being inlined into one function per instruction set.
#if defined(_MSC_VER)
#define MAMBA_ALWAYS_INLINE __forceinline
#else
#define MAMBA_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

// GCC for Windows throws exceptions that libraries built by cl.exe cannot catch.
#if defined(__MINGW32__)
#define MAMBA_FOREIGN_EXCEPTIONS 1
#else
#define MAMBA_FOREIGN_EXCEPTIONS 0
#endif
