# Writes one .cu file per group of tensor-core kernels. Files are apart because CUTLASS's take most of a minute each.
#   sm80_sources, sm90_cutlass_sources: one per name of csrc/grouped_gemm/tensor_core_kernels.h
#   sm80_stand_ins: likewise, what tests/emulation runs in their place
#   sm90_product_sources: one per dtype and tile of csrc/grouped_gemm/sm90/products.h
set(generated "${CMAKE_BINARY_DIR}/grouped_gemm")
set(sm80_sources "")
set(sm80_stand_ins "")
set(sm90_cutlass_sources "")
set(sm90_product_sources "")

# Name, element, layout of A, layout of B, element of D.
function(moe_ext_cutlass_kernel kernel element layout_a layout_b element_d)
  configure_file(csrc/grouped_gemm/sm80/instantiation.cu.in "${generated}/sm80/${kernel}.cu" @ONLY)
  list(APPEND sm80_sources "${generated}/sm80/${kernel}.cu")
  configure_file(csrc/grouped_gemm/sm90/cutlass_instantiation.cu.in "${generated}/sm90_cutlass/${kernel}.cu" @ONLY)
  list(APPEND sm90_cutlass_sources "${generated}/sm90_cutlass/${kernel}.cu")
  if(MOE_EXT_EMULATION)
    configure_file(tests/emulation/sm80_instantiation.cpp.in "${generated}/stand_in/${kernel}.cpp" @ONLY)
  endif()
  list(APPEND sm80_stand_ins "${generated}/stand_in/${kernel}.cpp")
  set(sm80_stand_ins "${sm80_stand_ins}" PARENT_SCOPE)
  set(sm80_sources "${sm80_sources}" PARENT_SCOPE)
  set(sm90_cutlass_sources "${sm90_cutlass_sources}" PARENT_SCOPE)
endfunction()

foreach(short IN ITEMS bf16 fp16)
  string(REPLACE "bf16" "bfloat16_t" element "${short}")
  string(REPLACE "fp16" "half_t" element "${element}")
  moe_ext_cutlass_kernel(forward_enk_${short} ${element} RowMajor ColumnMajor cutlass::${element})
  moe_ext_cutlass_kernel(forward_ekn_${short} ${element} RowMajor RowMajor cutlass::${element})
  moe_ext_cutlass_kernel(wgrad_${short} ${element} ColumnMajor RowMajor cutlass::${element})
  moe_ext_cutlass_kernel(wgrad_${short}_fp32 ${element} ColumnMajor RowMajor float)
endforeach()

# Table of products.h, what becomes of the product, dtype, tile.
function(moe_ext_fused_products table finish dtype element tile rows columns stages cluster)
  set(file "${generated}/sm90/${table}_${dtype}_${tile}.cu")
  configure_file(csrc/grouped_gemm/sm90/fused_products.cu.in "${file}" @ONLY)
  set(sm90_product_sources "${sm90_product_sources};${file}" PARENT_SCOPE)
endfunction()

# Name, rows, columns, stages, cluster: the rows of kSm90Tiles in csrc/grouped_gemm/tile_choice.h.
foreach(dtype IN ITEMS bf16 fp16)
  string(REPLACE "bf16" "BFloat16" element "${dtype}")
  string(REPLACE "fp16" "Half" element "${element}")
  foreach(row IN ITEMS 128x256,128,256,4,1 128x128,128,128,6,1 64x256,64,256,4,1 128x256x2,128,256,4,2)
    string(REPLACE "," ";" row "${row}")
    list(GET row 0 tile)
    list(GET row 1 rows)
    list(GET row 2 columns)
    list(GET row 3 stages)
    list(GET row 4 cluster)
    set(file "${generated}/sm90/products_${dtype}_${tile}.cu")
    configure_file(csrc/grouped_gemm/sm90/products.cu.in "${file}" @ONLY)
    list(APPEND sm90_product_sources "${file}")
    moe_ext_fused_products(activated kActivate ${dtype} ${element} ${row})
  endforeach()
  moe_ext_fused_products(differentiated kDifferentiate ${dtype} ${element} 128x128 128 128 6 1)
endforeach()
