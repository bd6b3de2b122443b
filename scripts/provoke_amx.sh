#!/bin/sh
# Provokes, on Linux with AVX-512 and without AMX, what a virtual machine does that lists AMX and traps it:
#
#     sh scripts/provoke_amx.sh MODEL.gguf     # in an environment with kvp_edge; MODEL with quantised weights
#
# ggml's CPU backend is compiled with AMX (GCC 11 or newer, cmake), and a preloaded library says that Linux
# grants it. docs/processors.md says what comes out. The last step needs root.
set -eu
model=$(realpath "$1")
repository=$(cd "$(dirname "$0")/.." && pwd)
cd "$(mktemp -d)"
pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON \
    -DGGML_AMX_TILE=ON -DGGML_AMX_INT8=ON -DGGML_AMX_BF16=ON
cmake --build build --target ggml-cpu
cp -r "$(python -c 'import llama_cpp; print(llama_cpp.__path__[0])')/lib" lib
cp -L build/bin/libggml-cpu.so.0 lib/
cat > grant.c <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/syscall.h>
typedef long call(long, long, long, long, long, long, long);
long syscall(long n, long a, long b, long c, long d, long e, long f) {
    if (n == SYS_arch_prctl && a == 0x1023 && b == 18) return 0; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return ((call *)dlsym(RTLD_NEXT, "syscall"))(n, a, b, c, d, e, f);
}
END
cc -shared -fPIC -o grant.so grant.c
export LLAMA_CPP_LIB_PATH="$PWD/lib" LD_PRELOAD="$PWD/grant.so" XDG_CACHE_HOME="$PWD/cache"
python -c 'import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], verbose=False).eval([1, 2, 3])' "$model" ||
    echo "status $? (132 is Illegal instruction)"
kvp-edge run "$model" --prompt Hello               # works, and says so
kvp-edge run "$model" --prompt Hello --repack on ||
    echo "status $? (132 is Illegal instruction)"
kvp-edge doctor || echo "status $? (1: a fault was found)"

# Lists AMX for scripts/fresh.py, in this command alone.
sed '/^flags/s/$/ amx_tile amx_int8/' /proc/cpuinfo > cpuinfo
unshare -m sh -c 'mount --bind cpuinfo /proc/cpuinfo && python3 "$1/scripts/fresh.py" env' sh "$repository"
