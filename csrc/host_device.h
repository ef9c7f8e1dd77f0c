// For functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define AMPO_HOST_DEVICE __host__ __device__
#else
#define AMPO_HOST_DEVICE
#endif
