// Functions that host code and kernels share.
#pragma once

#if defined(__CUDACC__)
#define MOE_HOST_DEVICE __host__ __device__
#else
#define MOE_HOST_DEVICE
#endif

// For what loops over rows call: always inline on the host too, since a call inside a loop keeps it from vectorising.
#ifdef __CUDACC__
#define MOE_HOST_DEVICE_INLINE __host__ __device__ inline
#else
#define MOE_HOST_DEVICE_INLINE inline __attribute__((always_inline))
#endif
