"""The multiplication that stands for a division in kernels, compiled for the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from host_library import compile_library

PROGRAM = r"""
#include "common/divisor.h"
// Wrong quotients on both sides of multiples of `divisor`, where they change: the smallest `near`, the largest, and as
// many between.
extern "C" long long mistakes(long long divisor, long long near) {
  constexpr long long kEnd = 1ll << 31;
  const moe_ext::Divisor made = moe_ext::divisor_of(divisor);
  long long wrong = 0;
  const auto check = [&](long long n) { wrong += n >= 0 && n < kEnd && made.divide(static_cast<int>(n)) != n / divisor; };
  const long long multiples = kEnd / divisor;
  const auto around = [&](long long multiple) {
    for (long long n = -1; n <= 1; ++n) check(multiple * divisor + n);
  };
  for (long long i = 0; i <= near; ++i) {
    if (i <= multiples) around(i), around(multiples - i);
    around(multiples / (near + 1) * i);
  }
  check(kEnd - 1);
  return wrong;
}
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    source = Path(__file__).resolve().parent.parent / "csrc"
    found = compile_library(PROGRAM, source, tmp_path_factory.mktemp("divisor")).mistakes
    found.restype = ctypes.c_longlong
    found.argtypes = [ctypes.c_longlong] * 2
    return found


def test_small_divisors(mistakes):
    for divisor in range(1, 1025):
        assert mistakes(divisor, 2000) == 0, divisor


def test_divisors_about_powers_of_two(mistakes):
    for power in range(1, 63):
        for divisor in (2**power - 1, 2**power, 2**power + 1):
            assert mistakes(divisor, 2000) == 0, divisor
