// The main function of the C++ tests. Each test lives in csrc/tests/<layer>/<file>_test.cpp and
// proves host logic without Python; parity with the oracle is tested in python_tests/.
// Tests of threads carry the tag [threads], some of kernels [races]: `make tsan` runs exactly
// those.

#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
