// LEMO_MULTIVERSION before a hot function compiles it for AVX-512, AVX2 and the baseline; the
// loader picks the best one for the machine. What the function calls is cloned with it only where
// it is inlined.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define LEMO_MULTIVERSION \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEMO_MULTIVERSION
#endif
