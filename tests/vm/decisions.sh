# Runs in a guest: counted programs recorded with both layers in one trace, and a small trace to keep in another.
sysctl -qw vm.nr_hugepages=4
over=-
mkdir -p /var/tmp/lower /var/tmp/upper /var/tmp/work /var/tmp/merged
mount -t overlay -o lowerdir=/var/tmp/lower,upperdir=/var/tmp/upper,workdir=/var/tmp/work overlay /var/tmp/merged \
    2>overlay.err && over=/var/tmp/merged/file

cat >counted <<EOF
./splits
./merges
./mremap_counts
./fork_counts
./stack_growth
./exec_chain
./corners /job/corners.maps $over
./vmafuzz 1 1500 --children 4
EOF
cat >small <<EOF
./corners /job/corners.maps $over
./vmafuzz 7 40
EOF
for name in counted small; do
    vmatrace record -q --layer decisions -o $name.vmat -- sh $name
    echo "$name $?" >>status
done
