// linux/vhost.h, made fit for C++: its ring helpers convert void pointers as only C allows.
#pragma once

#define VIRTIO_RING_NO_LEGACY
#include <linux/vhost.h>
#undef VIRTIO_RING_NO_LEGACY
