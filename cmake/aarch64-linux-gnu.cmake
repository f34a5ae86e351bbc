# A cross build for 64-bit Arm on Linux, by Debian's g++-aarch64-linux-gnu: set CMAKE_TOOLCHAIN_FILE to this file's path.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;/usr/aarch64-linux-gnu)
