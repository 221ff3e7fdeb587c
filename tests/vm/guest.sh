# Runs in each guest of the matrix: $1 operations of the fuzz and the rest of the workloads, recorded in one trace.
uname -r >release
sysctl -qw vm.nr_hugepages=4
over=-
mkdir -p /var/tmp/lower /var/tmp/upper /var/tmp/work /var/tmp/merged
mount -t overlay -o lowerdir=/var/tmp/lower,upperdir=/var/tmp/upper,workdir=/var/tmp/work overlay /var/tmp/merged \
    2>overlay.err && over=/var/tmp/merged/file

# The limit is low only while maxmap runs; the shell's own echo needs no map. The recorder looks at the limits twice
# a second: what it should know must last longer.
cat >workloads <<EOF
./vmafuzz 1 $1 -o /job/vmafuzz.maps & echo \$! >vmafuzz.pid; wait
./corners /job/corners.maps $over >corners.out & echo \$! >corners.pid; wait
./exec_chain
./fork_counts
./stack_growth
limit=\$(cat /proc/sys/vm/max_map_count)
echo 3000 >/proc/sys/vm/max_map_count
sleep 2
./maxmap >maxmap.json
sleep 2
echo \$limit >/proc/sys/vm/max_map_count
EOF
vmatrace record -q --buffer 64M -o all.vmat -- sh workloads 2>record.err
echo "record $?" >status
vmatrace fingerprint --format json >fingerprint.json 2>fingerprint.err
echo "fingerprint $?" >>status
