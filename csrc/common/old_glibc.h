// The versions of glibc's functions that a library asks for. The newest ones of the machine that compiles would bind
// the library to machines that are as new. These have been in glibc since its first release for the architecture.
#pragma once

#include <cstddef>  // defines __GLIBC__

#if defined(__GLIBC__)
#  if defined(__x86_64__)
#    define STEAM_OLD_GLIBC(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
#  elif defined(__aarch64__)
#    define STEAM_OLD_GLIBC(name) __asm__(".symver " #name "," #name "@GLIBC_2.17")
#  endif
#endif
#if !defined(STEAM_OLD_GLIBC)
#  define STEAM_OLD_GLIBC(name) static_assert(true)
#endif
