#!/bin/busybox sh
# What udhcpc calls with a lease: gives the interface its address, the default route and the name server.
case $1 in
bound | renew)
	ip address flush dev "$interface"
	ip address add "$ip/${mask:-24}" dev "$interface"
	[ -z "$router" ] || ip route add default via "${router%% *}"
	for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
	;;
deconfig) ip link set "$interface" up ;;
esac
