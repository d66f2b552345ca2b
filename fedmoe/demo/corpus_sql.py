"""Questions over twenty small databases → SQL; every query was executed in sqlite3 and returned rows.

A database is two tables, a parent and its children, whose columns have roles: a label, a category, a number
and, for the child, a day. A query is a shape (corpus_sql_shapes.py) filled with the names and values of one
database: words, columns and structure vary independently. All text was written for FedMoE.
"""

import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import date, timedelta

from fedmoe.demo.corpus_rows import Row
from fedmoe.demo.corpus_sql_shapes import AGGREGATES, FILTERS, SHAPES

ROWS_PER_SHAPE = 2
TRIES = 8
PARENTS, CHILDREN = 9, 60
FIRST_DAY, DAYS = date(2019, 1, 1), 5 * 365

# name | parent table, noun: label=pool category=values number=range | child table, noun, key: the same, day
DATABASES = """
library | authors author: name=person country=France/Japan/Chile/Kenya born=1930-1995
        | books book author_id: title=work genre=novel/essay/poetry/travel pages=80-900 published=day
clinic  | doctor doctor: name=person specialty=surgery/cardiology/neurology salary=50000-140000
        | visit visit doctor_id: patient=person reason=checkup/fracture/fever fee=40-400 recorded_on=day
shop    | Customers customer: FullName=person City=Lyon/Osaka/Oslo/Quito CreditLimit=500-9000
        | Orders order CustomerId: Item=thing Payment=card/cash/voucher Price=5-900 placed_on=day
airline | airport airport: city=place region=north/south/islands runways=1-6
        | flight flight origin_id: code=code aircraft=A320/B737/E190 seats=60-220 departed_on=day
school  | teachers teacher: surname=person subject=physics/history/music/biology years=1-40
        | courses course teacher_id: title=work level=beginner/advanced/expert credits=1-12 started_on=day
league  | club club: town=place division=first/second/third founded=1890-1990
        | player player club_id: name=person position=goalkeeper/defender/forward goals=0-40 signed_on=day
cinema  | directors director: name=person nationality=Italian/Korean/Mexican awards=0-12
        | movies movie director_id: title=work genre=drama/comedy/western minutes=70-210 released=day
farm    | fields field: label=place soil=clay/sand/loam hectares=2-90
        | harvests harvest field_id: crop=crop grade=premium/standard/feed tonnes=1-120 gathered_on=day
factory | machine machine: model=code hall=east/west/north power_kw=5-400
        | fault fault machine_id: part=thing severity=minor/major/critical downtime=5-600 reported_on=day
museum  | artist artist: name=person movement=cubism/realism/baroque birth_year=1600-1950
        | painting painting artist_id: title=work technique=oil/fresco height_cm=20-300 acquired_on=day
bank    | accounts account: holder=person branch=harbour/station/market balance=100-50000
        | transfers transfer account_id: payee=person channel=app/counter/phone amount=5-3000 made_on=day
hotels  | Hotel hotel: Name=place Category=budget/business/luxury Rooms=12-300
        | Booking booking HotelId: Guest=person RoomType=single/double/suite Nights=1-21 booked_on=day
weather | stations station: site=place terrain=coast/valley/summit altitude=2-3200
        | readings reading station_id: observer=person sky=clear/cloudy/storm rainfall=0-90 taken_on=day
tram    | line line: route=place colour=red/green/blue stops=8-40
        | trip trip line_id: vehicle=code shift=morning/evening/night passengers=10-400 driven_on=day
label   | bands band: name=work origin=Iceland/Ghana/Brazil members=1-9
        | albums album band_id: title=work format=vinyl/cassette/download tracks=4-24 issued=day
press   | reporter reporter: byline=person desk=sports/politics/science articles_due=1-30
        | article article reporter_id: headline=work section=print/web/podcast words=150-4000 printed_on=day
depot   | suppliers supplier: company=place carrier=rail/truck/ship rating=1-10
        | deliveries delivery supplier_id: goods=thing state=intact/damaged/late crates=1-80 received_on=day
tracker | developer developer: login=person team=core/mobile/infra seniority=1-20
        | ticket ticket developer_id: summary=thing status=open/closed/blocked hours=1-90 opened_on=day
sky     | Telescope telescope: Site=place Mount=fixed/orbital/mobile MirrorCm=20-800
        | Observation observation TelescopeId: Target=code Band=infrared/radio Exposure=10-900 seen_on=day
kennel  | owners owner: name=person town=Bergen/Porto/Turin visits=1-50
        | pets pet owner_id: nickname=thing species=dog/cat/rabbit weight=1-60 born=day
"""

# Not from strftime, which depends on the locale.
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
POOLS = {
    pool: words.split()
    for pool, words in {
        "person": "Abara Bellini Castro Dvorak Eriksen Fontaine Gupta Haddad Ivanova Jansen Kimura Lopez",
        "place": "Alder Birch Cedar Dune Elm Fjord Grove Heath Isle Juniper Knoll Laurel",
        "thing": "anchor bolt candle drum engine filter gasket hinge inkwell jar kettle ladder",
        "crop": "apples barley carrots flax hops maize oats potatoes rye wheat",
        "work": "Avalanche Borderland Comet Driftwood Ember Foxglove Gravity Harvest Icarus Jubilee",
        "code": "A101 B205 C317 D442 E518 F663 G707 H829 J930",
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table and the roles of its columns; `key` (to the parent) and `day` are "" for a parent."""

    name: str
    noun: str
    key: str
    label: str
    pool: str  # of POOLS: what the label's values are
    category: str
    values: tuple[str, ...]  # of the category
    number: str
    low: int
    high: int
    day: str

    @classmethod
    def parse(cls, text: str) -> "Table":
        """Read one line of DATABASES, from the table's name on."""
        table, columns = text.split(":")
        name, noun, *key = table.split()
        (label, pool), (category, values), (number, limits), *day = (c.split("=") for c in columns.split())
        low, high = limits.split("-")
        return cls(
            name=name,
            noun=noun,
            key=key[0] if key else "",
            label=label,
            pool=pool,
            category=category,
            values=tuple(values.split("/")),
            number=number,
            low=int(low),
            high=int(high),
            day=day[0][0] if day else "",
        )

    @property
    def plural(self) -> str:
        """The noun for several: deliveries, books."""
        return self.noun[:-1] + "ies" if self.noun.endswith("y") else self.noun + "s"

    def ddl(self, parent: str = "") -> str:
        """Return the CREATE TABLE statement; `parent` is the table that the key refers to."""
        columns = ["id INTEGER PRIMARY KEY"]
        columns += [f"{self.key} INTEGER REFERENCES {parent}(id)"] if self.key else []
        columns += [f"{self.label} TEXT", f"{self.category} TEXT", f"{self.number} INTEGER"]
        columns += [f"{self.day} DATE"] if self.day else []
        return f"CREATE TABLE {self.name} ({', '.join(columns)});"


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """Two tables with generated rows in memory, and the random generator of the rows and queries."""

    name: str
    parent: Table
    child: Table
    rng: random.Random
    connection: sqlite3.Connection

    @property
    def ddl(self) -> str:
        """Return both CREATE TABLE statements."""
        return f"{self.parent.ddl()}\n{self.child.ddl(self.parent.name)}"

    def fill(self) -> None:
        """Create and fill the tables; the last parent gets no children, so that queries for such parents find one."""
        self.connection.executescript(self.ddl)
        parent, child, rng = self.parent, self.child, self.rng
        parents = [
            (index + 1, label, rng.choice(parent.values), rng.randint(parent.low, parent.high))
            for index, label in enumerate(rng.sample(POOLS[parent.pool], PARENTS))
        ]
        children = [
            (
                index + 1,
                rng.randint(1, PARENTS - 1),
                rng.choice(POOLS[child.pool]),
                rng.choice(child.values),
                rng.randint(child.low, child.high),
                self.draw_day().isoformat(),
            )
            for index in range(CHILDREN)
        ]
        for table, rows in ((parent, parents), (child, children)):
            marks = ", ".join("?" * len(rows[0]))
            self.connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)  # noqa: S608  # our names

    def draw(self, questions: list[str], query: str) -> Row | None:
        """Fill a shape with names and drawn values until its query returns something, TRIES times at most."""
        for _ in range(TRIES):
            words = self._names() | self._values()
            phrase, condition = self.rng.choice(FILTERS)
            words |= {"which": phrase.format_map(words), "WHICH": condition.format_map(words)}
            sql = query.format_map(words)
            answer = self.connection.execute(sql).fetchmany(1)
            if answer and any(value not in (None, 0) for value in answer[0]):
                asked = self.rng.choice(questions).format_map(words)
                return Row(
                    prompt=f"{self.ddl}\n\n{asked[0].upper()}{asked[1:]}\nAnswer with one SQLite query.",
                    completion=f"{sql};",
                    source=self.name,
                )
        return None

    def draw_day(self) -> date:
        """Draw a day in the years of the tables."""
        return FIRST_DAY + timedelta(days=self.rng.randrange(DAYS))

    def _names(self) -> dict[str, object]:
        """Return the identifiers (capitals) and their words (small letters)."""
        names: dict[str, object] = {"P": self.parent.name, "C": self.child.name, "KEY": self.child.key}
        names |= {"parent": self.parent.noun, "parents": self.parent.plural}
        names |= {"child": self.child.noun, "children": self.child.plural}
        for letter, table in (("p", self.parent), ("c", self.child)):
            for role in ("label", "category", "number", "day"):
                column = getattr(table, role)
                names[f"{letter}_{role}".upper()] = column
                names[f"{letter}_{role}"] = in_words(column)
        return names

    def _values(self) -> dict[str, object]:
        """Draw the values that a question may use."""
        rng, child = self.rng, self.child
        value, other = rng.sample(child.values, 2)
        span = child.high - child.low
        low = child.low + rng.randint(0, span // 2)
        day = self.draw_day()
        agg, function = rng.choice(AGGREGATES)
        agg_end, end_function = rng.choice([pair for pair in AGGREGATES if pair[1] in ("MAX", "MIN")])
        return {
            "value": value,
            "other": other,
            "p_value": rng.choice(self.parent.values),
            "p_name": rng.choice(POOLS[self.parent.pool]),
            "n": rng.randint(child.low + span // 5, child.high - span // 5),
            "low": low,
            "high": low + rng.randint(span // 5, span // 2),
            "k": rng.randint(2, 9),
            "few": rng.randint(3, 9),
            "year": day.year,
            "month": MONTHS[day.month - 1],
            "mm": f"{day.month:02}",
            "day": day,
            "later": day + timedelta(days=rng.randint(40, 700)),
            "letter": rng.choice(POOLS[child.pool])[0],
            "agg": agg,
            "AGG": function,
            "agg_end": agg_end,
            "AGG_END": end_function,
        }


def sql_rows(seed: int = 0) -> Iterator[Row]:
    """Yield up to ROWS_PER_SHAPE rows for each pair of database and shape, database by database."""
    shapes = [_shape(block) for block in SHAPES.strip().split("\n\n")]
    for database in databases(seed):
        for questions, query in shapes:
            for _ in range(ROWS_PER_SHAPE):
                row = database.draw(questions, query)
                if row:
                    yield row


def databases(seed: int = 0) -> Iterator[Database]:
    """Yield each of DATABASES, filled; its connection is closed when the next one is asked for."""
    lines = DATABASES.strip().splitlines()
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        name, parent = first.split("|")
        _, child = second.split("|")
        with closing(sqlite3.connect(":memory:")) as connection:
            database = Database(
                name=name.strip(),
                parent=Table.parse(parent),
                child=Table.parse(child),
                rng=random.Random(f"{seed}/{name.strip()}"),  # noqa: S311  # nothing secret is drawn
                connection=connection,
            )
            database.fill()
            yield database


def in_words(identifier: str) -> str:
    """Return an identifier as English: CreditLimit → credit limit, placed_on → placed."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", identifier).lower().removesuffix(" on")


def _shape(block: str) -> tuple[list[str], str]:
    """Return the questions and the query of one block of SHAPES."""
    lines = block.replace("\n  ", " ").splitlines()
    return [line[2:] for line in lines if line.startswith("?")], lines[-1].removeprefix("= ")
