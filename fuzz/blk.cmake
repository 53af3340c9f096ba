wisp_fuzz(blk SOURCES blk_fuzz.cpp USES virtio virtio_test_support)
