#!/bin/sh
# PID 1 of a lab guest: mounts what is needed, unpacks the job, runs it, writes its results, powers off.
# Whatever fails ends in a kernel panic (PID 1 exits), which ends QEMU.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb

mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs -o size=768M tmpfs /lab
mount -t tracefs tracefs /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
mount -t securityfs securityfs /sys/kernel/security
echo lab >/proc/sys/kernel/hostname
ulimit -c 0

# NVMe disks come up in any order: each is known by its serial number.
disk() {
    for found in /sys/block/nvme*; do
        read -r serial <"$found/device/serial"
        [ "$serial" = "$1" ] && echo "/dev/${found##*/}"
    done
}

# A root in memory has its job unpacked already and writes to a virtio port.
port() {
    for found in /sys/class/virtio-ports/*; do
        read -r name <"$found/name"
        [ "$name" = labout ] && echo "/dev/${found##*/}"
    done
}

mkdir -p /lab/out /job
if [ -e /lab-job.tar ]; then
    tar -xf /lab-job.tar -C /
    out=$(port)
else
    tar -xf "$(disk labjob)" -C /
    out=$(disk labout)
fi
echo "vmatrace-lab: up" >/dev/console
sh /lab/run
sh /lab/collect "$out"
echo "vmatrace-lab: done" >/dev/console
sync
mount -o remount,ro / 2>/dev/null
echo o >/proc/sysrq-trigger
sleep 30
