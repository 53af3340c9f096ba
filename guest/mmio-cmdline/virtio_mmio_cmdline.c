// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * virtio_mmio.device= for kernels whose virtio_mmio driver was built without CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, as
 * Debian's is. Takes the same words as module parameters,
 *
 *   insmod virtio_mmio_cmdline.ko device=4K@0xd0000000:5 device=4K@0xd0001000:6
 *
 * (size@address:interrupt) and makes one platform device of each, which virtio_mmio binds to by its name. The guests
 * of tests without ACPI (acpi=off) find their devices through it.
 */
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/platform_device.h>

#define MAX_DEVICES 64

static struct platform_device *devices[MAX_DEVICES];
static unsigned int count;

static int add_device(const char *text, const struct kernel_param *unused)
{
	unsigned long long base;
	unsigned int irq;
	int used = 0;
	char *rest;
	unsigned long long size = memparse(text, &rest);
	struct platform_device *device;

	if (count == MAX_DEVICES)
		return -ENOSPC;
	if (size == 0 || rest == text ||
	    sscanf(rest, "@%lli:%u%n", &base, &irq, &used) < 2 || used == 0)
		return -EINVAL;
	{
		struct resource resources[] = {
			{ .start = base, .end = base + size - 1, .flags = IORESOURCE_MEM },
			{ .start = irq, .end = irq, .flags = IORESOURCE_IRQ },
		};

		device = platform_device_register_simple("virtio-mmio", count, resources,
							 ARRAY_SIZE(resources));
	}
	if (IS_ERR(device))
		return PTR_ERR(device);
	devices[count++] = device;
	return 0;
}

static const struct kernel_param_ops device_ops = { .set = add_device };
module_param_cb(device, &device_ops, NULL, 0200);
MODULE_PARM_DESC(device, "SIZE@ADDRESS:INTERRUPT, once for each device");

static int __init mmio_cmdline_init(void)
{
	return 0;
}

static void __exit mmio_cmdline_exit(void)
{
	while (count > 0)
		platform_device_unregister(devices[--count]);
}

module_init(mmio_cmdline_init);
module_exit(mmio_cmdline_exit);
MODULE_DESCRIPTION("virtio-mmio devices named by parameters");
MODULE_LICENSE("Dual MIT/GPL");
