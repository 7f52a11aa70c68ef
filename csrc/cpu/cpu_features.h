/* cpu_features.h - what this processor and operating system can run, by feature bits only (model numbers lie in VMs). */
#ifndef FGQA_CPU_FEATURES_H
#define FGQA_CPU_FEATURES_H

/* Whether a row of isa.def runs here, by its name ("avx512"); 0 for a name it does not know. */
int fgqa_cpu_has(const char *isa);

/* The features found, separated by spaces ("avx avx2 fma f16c avx512f ... amx_bf16"), for show_config. */
const char *fgqa_cpu_feature_names(void);

#endif
