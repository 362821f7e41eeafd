# The CPU GEMM's inner loops, once for each instruction set; tiled_gemm_cpu.cpp chooses at run time.
function(moe_ext_gemm_kernels isa)
  set(source "csrc/grouped_gemm/cpu/gemm_kernels_${isa}.cpp")
  target_sources(moe_ext PRIVATE ${source})
  # GCC's own headers trip its uninitialised-use warnings: they start "undefined" vectors from themselves.
  set_source_files_properties(
    ${source} PROPERTIES COMPILE_OPTIONS "${ARGN};-O3;-ffp-contract=fast;-Wno-uninitialized;-Wno-maybe-uninitialized")
endfunction()

moe_ext_gemm_kernels(portable)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  moe_ext_gemm_kernels(avx2 -march=x86-64-v3)
  moe_ext_gemm_kernels(avx512 -march=x86-64-v4)
  moe_ext_gemm_kernels(avx512_bf16 -march=x86-64-v4 -mavx512bf16)
endif()
