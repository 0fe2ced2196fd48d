#!/bin/sh
# What the image of PostgreSQL's makers does at its start: a cluster of $POSTGRES_USER, a database, the network.
set -eu
cd /var/lib/postgresql
bin=$(echo /usr/lib/postgresql/*/bin)
if [ ! -e data/PG_VERSION ]; then
    echo "$POSTGRES_PASSWORD" >password
    "$bin/initdb" --pgdata data --username "$POSTGRES_USER" --pwfile password --encoding UTF8 --locale C.UTF-8 --auth-local trust --auth-host scram-sha-256 >initdb.log
    rm password
    echo "host all all all scram-sha-256" >>data/pg_hba.conf
    "$bin/pg_ctl" --pgdata data --wait --options "-c listen_addresses=" start >start.log
    "$bin/createdb" --username "$POSTGRES_USER" "$POSTGRES_DB"
    "$bin/pg_ctl" --pgdata data --wait stop >stop.log
fi
exec "$bin/postgres" -D data -c "listen_addresses=*"
