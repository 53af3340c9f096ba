wisp_fuzz(boot_kernel SOURCES boot_kernel_fuzz.cpp USES boot memory base)
wisp_fuzz(boot_bzimage SOURCES boot_bzimage_fuzz.cpp USES boot memory base)
