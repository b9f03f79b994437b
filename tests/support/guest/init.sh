#!/bin/busybox sh
# shellcheck shell=dash
# What a guest's kernel runs first, in its initramfs: makes the machine's own file system, read-only, with what is
# written kept in memory, the guest's root, and hands over to systemd, which runs /guest/run in rewarm-guest.target.
/bin/busybox mkdir -p /proc /sys /dev /machine /written /root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in virtio_pci virtio_rng 9pnet_virtio 9p overlay; do
    modprobe "$module" || echo "init: no module $module"
done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 machine /machine
mount -t tmpfs -o size=3g tmpfs /written
mkdir /written/upper /written/work
mount -t overlay -o lowerdir=/machine,upperdir=/written/upper,workdir=/written/work overlay /root
# No symbolic link of the machine's is followed out of the new root: its /lib is one, within it.
for directory in proc sys dev run tmp guest guest-tmp usr/lib/modules; do
    mkdir -p "/root/$directory"
done
mount -t tmpfs -o mode=755 tmpfs /root/run
# Not /tmp: the checkout may be there.
mount -t tmpfs -o size=3g,mode=1777 tmpfs /root/guest-tmp
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 guest /root/guest
cp -a /lib/modules/* /root/usr/lib/modules/
rm -f /root/usr/sbin/modprobe
cp /bin/busybox /root/usr/sbin/modprobe
units=/root/etc/systemd/system
mkdir -p "$units"
cat >"$units/rewarm-guest.target" <<'END'
[Unit]
DefaultDependencies=no
AllowIsolate=yes
Requires=rewarm-guest.service
END
cat >"$units/rewarm-guest.service" <<'END'
[Unit]
DefaultDependencies=no
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/bin/bash /guest/run
StandardOutput=file:/guest/output
StandardError=inherit
TimeoutStartSec=infinity
Delegate=yes
END
for mounted in proc sys dev; do
    mount --move "/$mounted" "/root/$mounted"
done
exec switch_root /root /lib/systemd/systemd --unit=rewarm-guest.target
