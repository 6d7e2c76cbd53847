package main

import (
	"fmt"
	"strings"

	"github.com/outbox-platform/outbox/client"
)

type markerDDLCmd struct {
	Format string `default:"plain" enum:"plain,goose,alembic,django" help:"plain SQL, or a migration of goose, alembic or django."`
}

// Help implements kong.HelpProvider.
func (*markerDDLCmd) Help() string {
	return `The marker table belongs into each source database: the SDK writes one row into it in each transaction, and the row's
presence is the proof that the transaction committed. Put it into the schema that the service's search_path finds first. The
service's role needs SELECT, INSERT, UPDATE and DELETE on it; row security must be off.

Examples:
  outbox marker-ddl | psql "$ORDERS_DSN"
  outbox marker-ddl --format goose > migrations/00007_outbox_marker.sql`
}

// Run prints the table's definition.
func (c *markerDDLCmd) Run(s streams) error {
	_, err := fmt.Fprint(s.out, markerDDL(c.Format))
	return err
}

func markerDDL(format string) string {
	statements := sqlStatements(client.MarkerDDL)
	switch format {
	case "goose":
		return client.MarkerDDLGoose
	case "alembic":
		var b strings.Builder
		b.WriteString(`"""outbox marker table"""

from alembic import op

revision = "outbox_marker"  # rename as your migrations are named
down_revision = None  # the revision before


def upgrade() -> None:
`)
		for _, statement := range statements {
			fmt.Fprintf(&b, "    op.execute(\n        \"\"\"\n%s\n        \"\"\"\n    )\n", indent(statement, "        "))
		}
		b.WriteString("\n\ndef downgrade() -> None:\n    op.execute(\"DROP TABLE outbox_marker\")\n")
		return b.String()
	case "django":
		var b strings.Builder
		b.WriteString(`from django.db import migrations


class Migration(migrations.Migration):
    dependencies = []  # the migration before

    operations = [
        migrations.RunSQL(
            sql=[
`)
		for _, statement := range statements {
			fmt.Fprintf(&b, "                \"\"\"\n%s\n                \"\"\",\n", indent(statement, "                "))
		}
		b.WriteString(`            ],
            reverse_sql="DROP TABLE outbox_marker",
        ),
    ]
`)
		return b.String()
	default:
		return client.MarkerDDL
	}
}

// sqlStatements splits DDL that has no semicolon but at the ends of its statements.
func sqlStatements(ddl string) []string {
	var found []string
	for statement := range strings.SplitSeq(ddl, ";\n") {
		if statement = strings.TrimSpace(statement); statement != "" {
			found = append(found, strings.TrimSuffix(statement, ";"))
		}
	}
	return found
}

func indent(text, by string) string {
	return by + strings.ReplaceAll(text, "\n", "\n"+by)
}
