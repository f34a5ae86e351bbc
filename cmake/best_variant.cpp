// Prints the name of the best variant of the CPU kernels that this processor can run.
#include <cstdio>

#include "../csrc/cpu/processor.h"

int main() {
  std::puts(steam::cpu::has_avx512() ? "avx512" : steam::cpu::has_avx2() ? "avx2" : "generic");
  return 0;
}
