// Code of libstdc++ that torch's headers use and that old versions of libstdc++ and glibc lack. A library that has it
// inside runs with the libstdc++ of GCC 8, like torch itself.
#include <sstream>

#if defined(__GLIBCXX__)
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// glibc has this flag since 2.32. Where it is false, reference counts are atomic.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
